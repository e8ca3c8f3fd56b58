"""A GGUF file of the llama architecture -> config.json, generation_config.json, bfloat16 safetensors. For source.py.

The file is walked once with every length checked against its size before gguf's own reader touches it: that reader
follows a damaged length into endless loops. Weights are read, dequantised and written a few rows at a time.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from diptych.protos.errors import StartupError

from .tensors import write_bf16

_T = TypeVar("_T", int, float, str, bool)
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9  # GGUF's numbers of its value types
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_ARRAY = 4_000_000  # elements; vocabularies and merge lists stay below one million
_PIECE_ELEMENTS = 4 * 1024 * 1024  # 16 MiB of float32 at a time
_REMEDY = "Copy or download the file again."

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Walk:
    """A position in the file that cannot leave it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0
        self.size_bytes = len(data)

    def trouble(self, what: str) -> StartupError:
        return StartupError(f"{self._path} {what}. {_REMEDY}")

    def take(self, size_bytes: int) -> int:
        at = self._at
        if at + size_bytes > self.size_bytes:
            raise self.trouble(f"is truncated or damaged: its header goes on behind its end ({self.size_bytes} bytes)")
        self._at = at + size_bytes
        return at

    def u32(self) -> int:
        return int(_U32.unpack_from(self._data, self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self._data, self.take(8))[0])

    def string(self) -> bytes:
        size_bytes = self.u64()
        at = self.take(size_bytes)
        return self._data[at : at + size_bytes]

    def value(self) -> None:
        kind = self.u32()
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            self._array()
        elif kind in _SCALAR_BYTES:
            self.take(_SCALAR_BYTES[kind])
        else:
            raise self.trouble(f"is damaged: it has a metadata value of the unknown type {kind}")

    def _array(self) -> None:
        kind, length = self.u32(), self.u64()
        if length > _MAX_ARRAY:
            raise self.trouble(f"is damaged: it has a metadata list of {length} elements")
        if kind == _STRING:
            for _ in range(length):
                self.string()
        elif kind in _SCALAR_BYTES:
            self.take(length * _SCALAR_BYTES[kind])
        else:
            raise self.trouble(f"is damaged: it has a metadata list of the unknown type {kind}")


def _check_bounds(path: Path) -> None:
    """Raise StartupError unless every length in the file's header stays inside the file."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise StartupError(f"{path} is not a GGUF file (it does not begin with GGUF). {_REMEDY}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _walk_header(_Walk(path, data))
    except OSError as exc:
        raise StartupError(f"{path} cannot be read ({exc.strerror}). Check its permissions.") from exc


def _walk_header(walk: _Walk) -> None:
    from gguf import GGMLQuantizationType  # 0.4 s: only where a GGUF file is read

    walk.take(4)
    version = walk.u32()
    if version not in (2, 3):
        raise walk.trouble(f"is of GGUF version {version}; versions 2 and 3, little-endian, are read")
    num_tensors, num_values = walk.u64(), walk.u64()
    for _ in range(num_values):
        walk.string()
        walk.value()
    known = {int(kind) for kind in GGMLQuantizationType}
    for _ in range(num_tensors):
        name = walk.string().decode("utf-8", "replace")
        axes = walk.u32()
        if axes > 4:
            raise walk.trouble(f"is damaged: tensor {name} has {axes} axes")
        elements = 1
        for _ in range(axes):
            elements *= walk.u64()
        kind, offset = walk.u32(), walk.u64()
        if kind not in known:
            raise walk.trouble(f"holds tensor {name} of the unknown type {kind}; another quantisation may work")
        if elements > 8 * walk.size_bytes or offset > walk.size_bytes:  # no known type has less than one bit a weight
            raise walk.trouble(f"is truncated or damaged: tensor {name} lies behind its end ({walk.size_bytes} bytes)")


class GgufFile:
    """An open GGUF file whose header was checked. Raises StartupError where the file is no such file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_bounds(path)
        from gguf import GGUFReader

        try:
            self._reader: Any = GGUFReader(path)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as exc:
            raise self.trouble(f"is truncated or damaged ({exc})") from exc
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}

    def trouble(self, what: str, remedy: str = _REMEDY) -> StartupError:
        """The error that says `what` of this file and then the remedy."""
        return StartupError(f"{self.path} {what}. {remedy}")

    def try_get(self, key: str, kind: type[_T]) -> _T | None:
        """The metadata value of `key`, or None where the file has none. Raises when it is of another type."""
        field = self._reader.get_field(key)
        if field is None:
            return None
        try:
            value = field.contents()
        except (UnicodeDecodeError, IndexError) as exc:
            raise self.trouble(f"is damaged: {key} cannot be read") from exc
        if type(value) is not kind:
            raise self.trouble(f"has {key} of type {type(value).__name__}, not {kind.__name__}")
        return value

    def get(self, key: str, kind: type[_T]) -> _T:
        """The metadata value of `key`. Raises where it is missing or of another type."""
        value = self.try_get(key, kind)
        if value is None:
            raise self.trouble(f"lacks the metadata {key}")
        return value

    def items(self, key: str, kind: type[_T]) -> list[_T]:
        """The metadata list of `key`. Raises where it is missing or holds another type."""
        field = self._reader.get_field(key)
        if field is None:
            raise self.trouble(f"lacks the metadata {key}")
        try:
            values = field.contents()
        except (UnicodeDecodeError, IndexError) as exc:
            raise self.trouble(f"is damaged: {key} cannot be read") from exc
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise self.trouble(f"has {key} that is no list of {kind.__name__}")
        return values


def llama_config(file: GgufFile) -> dict[str, object]:
    """The config.json of a GGUF file of the llama architecture, as transformers 5 writes it."""
    architecture = file.get("general.architecture", str)
    offline = "Use the model's folder with config.json and *.safetensors instead."
    if architecture != "llama":
        raise file.trouble(f"is of the architecture {architecture}; llama is the only one read from GGUF", offline)
    if file.try_get("llama.expert_count", int):
        raise file.trouble("is a mixture of experts, which is not read from GGUF", offline)
    if (file.try_get("split.count", int) or 1) > 1:
        raise file.trouble("is one part of a split GGUF", "Merge the parts with llama.cpp's gguf-split --merge.")
    scaling = file.try_get("llama.rope.scaling.type", str)
    if scaling not in (None, "none") or "rope_freqs.weight" in file.tensors:
        raise file.trouble("scales its rotary embedding, which is not read from GGUF", offline)
    heads = file.get("llama.attention.head_count", int)
    hidden_size = file.get("llama.embedding_length", int)
    kv_heads = file.try_get("llama.attention.head_count_kv", int)
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or hidden_size < 1 or kv_heads < 1 or heads % kv_heads:
        raise file.trouble(f"is damaged: {heads} heads, {kv_heads} KV heads, {hidden_size} wide")
    head_dim = file.try_get("llama.attention.key_length", int) or hidden_size // heads
    value_dim = file.try_get("llama.attention.value_length", int) or head_dim
    rotary_dim = file.try_get("llama.rope.dimension_count", int) or head_dim
    if value_dim != head_dim or rotary_dim != head_dim or head_dim % 2:
        raise file.trouble(
            f"has heads of {head_dim}, values of {value_dim}, rotary part {rotary_dim}: not equal", offline
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.trouble("has no token embedding")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": file.try_get("tokenizer.ggml.bos_token_id", int),
        "dtype": "bfloat16",
        "eos_token_id": _eos(file),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": file.get("llama.feed_forward_length", int),
        "max_position_embeddings": file.get("llama.context_length", int),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": file.get("llama.block_count", int),
        "num_key_value_heads": kv_heads,
        "pad_token_id": file.try_get("tokenizer.ggml.padding_token_id", int),
        "rms_norm_eps": _short(file.get("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": {
            "rope_theta": _short(file.try_get("llama.rope.freq_base", float) or 10000.0),
            "rope_type": "default",
        },
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "use_cache": True,
        "vocab_size": int(embedding.shape[1]),
    }


def _eos(file: GgufFile) -> int | list[int] | None:
    """The end tokens: of the sequence, and of a turn where the file names another one for that."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    found = list(dict.fromkeys(value for key in keys if (value := file.try_get(key, int)) is not None))
    return found if len(found) > 1 else found[0] if found else None


def _short(value: float) -> float:
    """A float32 from the file as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def generation_config(config: Mapping[str, object]) -> dict[str, object]:
    """The generation_config.json that belongs to a config.json."""
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}


def _plan(file: GgufFile, config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """GGUF names by transformers names, and the shapes that config.json demands. Raises on any difference."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_size, kv_size = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    layer_shapes = {
        "attn_norm": (hidden,),
        "attn_q": (q_size, hidden),
        "attn_k": (kv_size, hidden),
        "attn_v": (kv_size, hidden),
        "attn_output": (hidden, q_size),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(min(config["num_hidden_layers"], len(file.tensors) + 1)):
        for short, long in _LAYER_NAMES.items():
            name = f"model.layers.{layer}.{long}.weight"
            names[name] = f"blk.{layer}.{short}.weight"
            shapes[name] = layer_shapes[short]
    names["model.norm.weight"], shapes["model.norm.weight"] = "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"], shapes["lm_head.weight"] = "output.weight", (vocab, hidden)
    lost = sorted(set(names.values()) - file.tensors.keys())
    strange = sorted(file.tensors.keys() - set(names.values()))
    if lost:
        raise file.trouble(f"lacks {len(lost)} tensors of a llama model, such as {lost[0]}")
    if strange:
        raise file.trouble(
            f"holds {len(strange)} tensors that a llama model does not have, such as {strange[0]}",
            "Use the model's folder with config.json and *.safetensors instead.",
        )
    for name, shape in shapes.items():
        found = tuple(reversed([int(axis) for axis in file.tensors[names[name]].shape]))
        if found != shape:
            raise file.trouble(f"is damaged: tensor {names[name]} has the shape {found}, its metadata say {shape}")
    return names, shapes


def _unpermuted(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of a query or key projection in transformers' order.

    llama.cpp rotates neighbours, transformers rotates halves; of a head with 4 rows
        in the file   x0 y0 x1 y1      ->      x0 x1 y0 y1
    Whole rows move, so this is done before they are dequantised.
    """
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite float32 as the bits of bfloat16, rounded to nearest, ties to even. Little-endian."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return rounded.astype("<u2")


def _pieces(file: GgufFile, config: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[memoryview]:
    from gguf.quants import dequantize

    for name, short in names.items():
        tensor = file.tensors[short]
        rows = tensor.data if tensor.data.ndim > 1 else tensor.data.reshape(1, -1)
        if name.endswith("q_proj.weight"):
            rows = _unpermuted(rows, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            rows = _unpermuted(rows, config["num_key_value_heads"])
        step = max(1, _PIECE_ELEMENTS * len(rows) // tensor.n_elements)
        for at in range(0, len(rows), step):
            try:
                values = dequantize(np.ascontiguousarray(rows[at : at + step]), tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                remedy = "Use a file in another quantisation, such as Q8_0, or the model's safetensors."
                raise file.trouble(f"holds {short} as {kind}, which cannot be read", remedy) from None
            values = np.ascontiguousarray(values, dtype=np.float32)
            if not np.isfinite(values).all():
                raise file.trouble(f"is damaged: tensor {short} holds values that are not numbers")
            yield memoryview(bf16_bits(values).tobytes())


def write_weights(file: GgufFile, config: Mapping[str, object], path: Path) -> None:
    """Write all weights to one safetensors file, under transformers' names; a tied output head is left out.

    Raises StartupError when the file's tensors are not those of `config`. May leave a partial file behind then.
    """
    names, shapes = _plan(file, config)
    write_bf16(path, shapes, _pieces(file, config, names))
