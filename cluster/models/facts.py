"""ModelFacts of a model folder, from config.json and the headers of its safetensors files. Called by source.py.

Refuses, with a sentence that says what to do: code in the checkpoint, pickled weights, broken or missing files,
nonsense sizes. Reads no weights and imports no model code: whether transformers knows the class, the engine asks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diptych.protos.errors import StartupError

from .defaults import NO_DEFAULTS, SamplingDefaults, read_defaults
from .tensors import TensorEntry, read_header
from .texts import Task, detect_task

_MAX_JSON_BYTES = 256 * 1024 * 1024  # the largest tokenizer.json known are around 35 MB
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the cluster must know of a model without loading it."""

    name: str
    architecture: str  # the transformers class, such as LlamaForCausalLM
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    weights_bytes: int  # on disk, all tensors
    num_parameters: int  # of the tensors in the files: a tied output head counts once
    eos_token_ids: tuple[int, ...]  # may be empty: then only max_tokens and stop strings end an answer
    bos_token_id: int | None
    dtype: str  # of most of the checkpoint's bytes, such as bfloat16
    chat_template: str | None  # Jinja source
    defaults: SamplingDefaults = NO_DEFAULTS
    task: Task = "generate"  # that it is made for


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with config.json, *.safetensors and tokenizer.json that passed every check, and its facts."""

    path: Path
    facts: ModelFacts


def read_facts(folder: Path, name: str, *, has_weights: bool = True) -> ModelFacts:
    """The facts of the model in `folder`, served as `name`. Raises StartupError with the file and the remedy.

    Without weights config.json and tokenizer.json are enough; the number of parameters is an estimate then.
    """
    config = _read_json(folder / "config.json", "A model folder needs the config.json of its checkpoint.")
    tokenizer_config = _read_optional_json(folder / "tokenizer_config.json")
    generation_config = _read_optional_json(folder / "generation_config.json")
    _refuse_code(folder / "config.json", config)
    _refuse_code(folder / "tokenizer_config.json", tokenizer_config)
    if config.get("quantization_config") is not None:
        raise StartupError(
            f"{folder / 'config.json'} describes quantised weights (quantization_config), which are not read in this "
            "version. Use the unquantised checkpoint of the model."
        )
    tensors = _read_tensors(folder) if has_weights else {}
    tokenizer = _read_json(
        folder / "tokenizer.json",
        "The tokenizer is read from tokenizer.json only: load the tokenizer once with transformers.AutoTokenizer and "
        "save_pretrained() it into this folder.",
    )
    if not isinstance(tokenizer.get("model"), dict):
        raise StartupError(
            f"{folder / 'tokenizer.json'} has no `model` object: it is no file of the tokenizers library."
        )
    sizes = _Sizes(folder / "config.json", config)
    heads = sizes.number(("num_attention_heads", "n_head", "num_heads"), 1_000)
    kv_heads = sizes.number(("num_key_value_heads", "num_kv_heads"), heads, default=heads)
    if heads % kv_heads:
        raise sizes.trouble(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if sizes.find(("head_dim",)) is None:
        hidden_size = sizes.number(("hidden_size", "n_embd", "d_model"), 1_000_000)
        if hidden_size % heads:
            raise sizes.trouble(f"hidden_size {hidden_size} is no multiple of num_attention_heads {heads}")
        head_dim = hidden_size // heads
    else:
        head_dim = sizes.number(("head_dim",), 10_000)
    layers = sizes.number(("num_hidden_layers", "n_layer", "num_layers"), 10_000)
    vocab_size = sizes.number(("vocab_size",), 100_000_000)
    _check_shapes(sizes, tensors, layers=layers, vocab_size=vocab_size)
    attention_width = 2 * (heads + kv_heads) * head_dim
    eos = generation_config.get("eos_token_id", sizes.find(("eos_token_id",)))
    bos = _token_ids(
        sizes, "bos_token_id", generation_config.get("bos_token_id", sizes.find(("bos_token_id",))), vocab_size
    )
    architecture = _architecture(sizes, config)
    return ModelFacts(
        name=name,
        architecture=architecture,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_context_tokens=_context_tokens(sizes),
        weights_bytes=sum(entry.end - entry.begin for entry in tensors.values()),
        num_parameters=sum(entry.num_elements for entry in tensors.values())
        if has_weights
        else _estimated_parameters(sizes, layers=layers, vocab_size=vocab_size, attention_width=attention_width),
        eos_token_ids=_token_ids(sizes, "eos_token_id", eos, vocab_size),
        bos_token_id=bos[0] if bos else None,
        dtype=_checkpoint_dtype(folder, tensors) if has_weights else "bfloat16",
        chat_template=_chat_template(folder, tokenizer_config),
        defaults=read_defaults(folder / "generation_config.json", generation_config),
        task=detect_task(folder, architecture),
    )


def _context_tokens(sizes: _Sizes) -> int:
    """Of a model with longrope only its original context: kernels/rope.py says why."""
    whole = sizes.number(("max_position_embeddings", "n_positions", "max_seq_len"), 1_000_000_000)
    rope = sizes.find(("rope_parameters", "rope_scaling"))
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return whole
    original = rope.get("original_max_position_embeddings", sizes.find(("original_max_position_embeddings",)))
    return min(whole, original) if isinstance(original, int) and original > 0 else whole


class _Sizes:
    """Numbers of config.json under the names that model families give them; the text part of a composite config."""

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        text = config.get("text_config")
        self._path = path
        self._config: Mapping[str, object] = {**config, **text} if isinstance(text, dict) else config

    def trouble(self, what: str) -> StartupError:
        return StartupError(f"{self._path}: {what}. Restore the config.json that belongs to these weights.")

    def find(self, names: tuple[str, ...]) -> object:
        """The value under the first of the names that is there and not null, or None."""
        return next((self._config[name] for name in names if self._config.get(name) is not None), None)

    def number(self, names: tuple[str, ...], most: int, default: int | None = None) -> int:
        value = self.find(names)
        if value is None:
            if default is None:
                raise self.trouble(f"the field {names[0]} is missing")
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise self.trouble(f"{names[0]} is {value!r}, not a whole number between 1 and {most}")
        return value


def _read_json(path: Path, remedy: str) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise StartupError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: not the file its name promises.")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StartupError(f"{path} is missing. {remedy}") from None
    except OSError as exc:
        raise StartupError(f"{path} cannot be read ({exc.strerror}). Check its permissions.") from exc
    except (ValueError, RecursionError) as exc:
        raise StartupError(f"{path} is not JSON ({exc}). Copy or download it again.") from None
    if not isinstance(value, dict):
        raise StartupError(f"{path} does not hold a JSON object. Copy or download it again.")
    return value


def _read_optional_json(path: Path) -> dict[str, object]:
    return _read_json(path, "") if path.exists() else {}


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _foreign_kernels(config: Mapping[str, object]) -> Iterator[str]:
    """Where transformers would fetch an implementation from a repository: a name with a slash."""
    for key, value in config.items():
        if key.endswith("_implementation") and "/" in json.dumps(value):
            yield key


def _refuse_code(path: Path, config: Mapping[str, object]) -> None:
    found = sorted(({"auto_map", "trust_remote_code"} & set(_keys(config))) | set(_foreign_kernels(config)))
    if found:
        raise StartupError(
            f"{path} asks to run Python code that came with the checkpoint ({', '.join(found)}); such code is never "
            "run. Use a checkpoint whose model_type transformers has itself; if this is such a model, remove the entry."
        )


def _read_tensors(folder: Path) -> dict[str, TensorEntry]:
    index = folder / _INDEX
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    if index.exists():
        weight_map = _weight_map(index)
        files = sorted(set(weight_map.values()))
    elif "model.safetensors" in files:
        files = ["model.safetensors"]
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise StartupError(
                f"{folder} holds its weights as a pickle ({pickles[0]}) and no *.safetensors. Unpickling runs code "
                "from the file, so it is not read: get the safetensors version, or load the model where you trust it "
                "and save_pretrained() it with transformers, which writes safetensors."
            )
        raise StartupError(f"{folder} holds no *.safetensors: copy the weights of the model into it.")
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        if not (folder / file).is_file():
            raise StartupError(f"{folder / file} is missing, but {_INDEX} lists it. Copy or download it again.")
        found = read_header(folder / file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise StartupError(
                f"{folder / file} holds {twice[0]} a second time. Keep the files of one checkpoint only."
            )
        lost = sorted(name for name, place in weight_map.items() if place == file and name not in found)
        if lost:
            raise StartupError(f"{folder / file} lacks {lost[0]}, which {_INDEX} places there. Get both files again.")
        tensors |= found
    if not tensors:
        raise StartupError(f"{folder}: its safetensors files hold no tensor. Copy or download them again.")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f"{index} has no weight_map. Copy or download it again.")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and not re.search(r"[/\\\x00]", file)
        if not plain or not file.endswith(".safetensors"):
            raise StartupError(
                f"{index} places {tensor} in {file!r}. Only *.safetensors files in the same folder are read: put the "
                "file there and name it without a path."
            )
    return weight_map


def _check_shapes(sizes: _Sizes, tensors: Mapping[str, TensorEntry], *, layers: int, vocab_size: int) -> None:
    """Where the tensors have the usual names, config.json must fit them."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is not None and embedding.shape[:1] != (vocab_size,):
        raise sizes.trouble(f"vocab_size is {vocab_size}, but the weights hold {embedding.shape[:1]} embeddings")
    found = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    lost = next((layer for layer in range(layers) if layer not in found), None) if found else None
    if lost is not None:
        raise sizes.trouble(f"num_hidden_layers is {layers}, but the weights have no layer {lost}")


def _estimated_parameters(sizes: _Sizes, *, layers: int, vocab_size: int, attention_width: int) -> int:
    """Of a decoder with gated MLPs or experts in every layer. `attention_width`: rows of q, k, v and o together."""
    hidden_size = sizes.number(("hidden_size", "n_embd", "d_model"), 1_000_000)
    inner_names = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
    inner_size = sizes.number(inner_names, 10_000_000, default=4 * hidden_size)
    experts = sizes.number(("num_experts", "num_local_experts", "n_routed_experts"), 100_000, default=1)
    embeddings = 1 if sizes.find(("tie_word_embeddings",)) else 2
    return hidden_size * (embeddings * vocab_size + layers * (attention_width + 3 * inner_size * experts))


def _architecture(sizes: _Sizes, config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or not names[0].isidentifier():
        raise sizes.trouble(f"architectures is {names!r}, not a list of one class name")
    return names[0]


def _token_ids(sizes: _Sizes, field: str, value: object, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if type(item) is not int or not 0 <= item < vocab_size:
            raise sizes.trouble(f"{field} holds {item!r}, not a token id below vocab_size {vocab_size}")
    return tuple(dict.fromkeys(ids))


def _checkpoint_dtype(folder: Path, tensors: Mapping[str, TensorEntry]) -> str:
    bytes_by_dtype: Counter[str] = Counter()
    for entry in tensors.values():
        bytes_by_dtype[entry.dtype] += entry.end - entry.begin
    most = bytes_by_dtype.most_common(1)[0][0]
    if most not in _DTYPES:
        raise StartupError(
            f"{folder} holds weights of dtype {most}, which are not read in this version. Use a checkpoint in "
            f"{', '.join(_DTYPES.values())}."
        )
    return _DTYPES[most]


def _chat_template(folder: Path, tokenizer_config: Mapping[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise StartupError(f"{path} cannot be read ({exc}). Copy it again, or remove it to use none.") from exc
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several templates by name; the one called default answers plain chats
        by_name = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
