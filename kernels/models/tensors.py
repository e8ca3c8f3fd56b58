"""A decoder's weights as it computes with them, linears over one input merged, allocated on the device at once.

Filled from safetensors, every tensor copied straight to its place, or with random numbers made there. Nothing is
unpickled. Called by loading in model.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diptych.protos.errors import StartupError

from ..weights import weight_files
from .shape import DecoderShape

Slots = dict[str, Tensor]  # a checkpoint's name of a tensor -> where it belongs
_SPELLINGS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ALL_UP, _ALL_DOWN = "gate_up_proj", "down_proj"  # all experts' matrices as one tensor
_PARTS_OF = {_ALL_UP: ("gate_proj.weight", "up_proj.weight"), _ALL_DOWN: ("down_proj.weight",)}


@dataclass(slots=True, eq=False)
class LayerTensors:
    """One decoder layer. I: its intermediate size, of an expert where it is sparse. [out, in] as torch has it."""

    input_norm: Tensor
    qkv: Tensor  # [(H + 2 G) D, hidden]: queries, keys, values
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    router: Tensor | None  # [E, hidden]; None in a dense layer
    gate_up: Tensor  # [2 I, hidden], [E, 2 I, hidden] in a sparse layer
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, I] or [E, hidden, I]
    down_bias: Tensor | None


@dataclass(slots=True, eq=False)
class DecoderTensors:
    """All weights of a decoder."""

    embedding: Tensor
    layers: list[LayerTensors]
    norm: Tensor
    head: Tensor  # the embedding itself where they are tied

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, by a name of its own."""
        yield "embedding", self.embedding
        for index, layer in enumerate(self.layers):
            for field in fields(layer):
                tensor = getattr(layer, field.name)
                if tensor is not None:
                    yield f"layers.{index}.{field.name}", tensor
        yield "norm", self.norm
        if self.head is not self.embedding:
            yield "head", self.head

    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for _, tensor in self.each())


def weights_bytes(shape: DecoderShape, dtype: torch.dtype) -> int:
    """What `allocate` takes, without taking it."""
    return allocate(shape, dtype, torch.device("meta")).nbytes()


def allocate(shape: DecoderShape, dtype: torch.dtype, device: torch.device) -> DecoderTensors:
    """Memory for all weights, not yet filled."""

    def new(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    heads, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, experts = shape.hidden, shape.experts

    def layer(sparse: bool) -> LayerTensors:
        assert experts is not None or not sparse
        inner = experts.intermediate if sparse and experts is not None else shape.intermediate
        many = (experts.num,) if sparse and experts is not None else ()
        return LayerTensors(
            input_norm=new(hidden),
            qkv=new(heads + 2 * narrow, hidden),
            qkv_bias=new(heads + 2 * narrow) if shape.qkv_bias else None,
            query_norm=new(shape.head_dim) if shape.head_norms else None,
            key_norm=new(shape.head_dim) if shape.head_norms else None,
            out=new(hidden, heads),
            out_bias=new(hidden) if shape.out_bias else None,
            mlp_norm=new(hidden),
            router=new(*many, hidden) if sparse else None,
            gate_up=new(*many, 2 * inner, hidden),
            gate_up_bias=new(2 * inner) if shape.mlp_bias else None,
            down=new(*many, hidden, inner),
            down_bias=new(hidden) if shape.mlp_bias else None,
        )

    embedding = new(shape.vocab_size, hidden)
    layers = [layer(sparse) for sparse in shape.sparse]
    return DecoderTensors(embedding, layers, new(hidden), embedding if shape.tied else new(shape.vocab_size, hidden))


def fill_randomly(tensors: DecoderTensors, shape: DecoderShape, seed: int) -> None:
    """Normal numbers of the model's own spread for matrices, 1 for norms, 0 for biases; the same for the same seed,
    shape and kind of device. Torch's own generators are left alone.
    """
    generator = torch.Generator(device=tensors.embedding.device).manual_seed(seed)
    for name, tensor in tensors.each():
        if name.endswith("norm"):
            tensor.fill_(1.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(0.0, shape.initializer_range, generator=generator)


def random_digest(shape: DecoderShape, dtype: torch.dtype, seed: int) -> bytes:
    """Stands for weights.weights_digest. Not equal to that of the same model on transformers' path, which draws its
    numbers in another order.
    """
    return hashlib.sha256(f"hand-written {dtype} {seed} {shape}".encode()).digest()


def load(tensors: DecoderTensors, shape: DecoderShape, folder: Path) -> None:
    """Fill all weights from the folder's safetensors files. StartupError names tensors that are missing, unexpected or
    of another shape.
    """
    slots = _slots(tensors, shape)
    loaded: set[str] = set()
    unexpected: list[str] = []
    wrong: list[str] = []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    target = _target(name, slots)
                    if target is None:
                        unexpected.append(name)
                        continue
                    tensor, place = file.get_tensor(name), slots[target]
                    if target == "lm_head.weight" and shape.tied:
                        place = _own_head(tensors, tensor)
                    if tensor.shape != place.shape:
                        wrong.append(f"{name} {list(tensor.shape)} instead of {list(place.shape)}")
                        continue
                    place.copy_(tensor)
                    loaded.add(target)
        except SafetensorError as exc:
            raise StartupError(f"{path} is not a readable safetensors file: {exc}") from exc
    _tie_equal_head(tensors)
    unexpected = [name for name in unexpected if not name.endswith("rotary_emb.inv_freq")]
    missing = sorted(_missing(slots, loaded, shape))
    problems = [
        f"{kind}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("not fitting", wrong))
        if names
    ]
    if problems:
        raise StartupError(f"The weights in {folder} do not fit {shape.architecture}; tensors {'; '.join(problems)}.")


def _own_head(tensors: DecoderTensors, given: Tensor) -> Tensor:
    """A place for the head that a checkpoint of a tied model holds: usually the embedding again, and then the copy
    that is made here is the only cost.
    """
    if tensors.head is tensors.embedding and given.shape == tensors.embedding.shape:
        tensors.head = torch.empty_like(tensors.embedding)
    return tensors.head


def _tie_equal_head(tensors: DecoderTensors) -> None:
    """Let go of a head that is the embedding in other memory."""
    if tensors.head is not tensors.embedding and torch.equal(tensors.head, tensors.embedding):
        tensors.head = tensors.embedding


def _target(name: str, slots: Mapping[str, Tensor]) -> str | None:
    """The name in `slots` for one in a file: Mixtral's files spell an expert's matrices in their own way, and a base
    model's leave out the prefix.
    """
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if ".experts." in name:
        before, _, leaf = name.removesuffix(".weight").rpartition(".")
        name = name.replace(f"{before}.{leaf}", f"{before}.{_SPELLINGS.get(leaf, leaf)}")
    return next((one for one in (name, f"model.{name}") if one in slots), None)


def _slots(tensors: DecoderTensors, shape: DecoderShape) -> Slots:
    """Every name that `_target` gives."""
    slots = {"model.embed_tokens.weight": tensors.embedding, "model.norm.weight": tensors.norm}
    slots["lm_head.weight"] = tensors.head
    narrow = shape.kv_heads * shape.head_dim
    rows = [shape.heads * shape.head_dim, narrow, narrow]
    for index, layer in enumerate(tensors.layers):
        attn, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        slots[f"model.layers.{index}.input_layernorm.weight"] = layer.input_norm
        slots[f"model.layers.{index}.post_attention_layernorm.weight"] = layer.mlp_norm
        for kind, qkv, out in (("weight", layer.qkv, layer.out), ("bias", layer.qkv_bias, layer.out_bias)):
            if qkv is not None:
                names = (f"{attn}.{part}_proj.{kind}" for part in "qkv")
                slots |= dict(zip(names, torch.split(qkv, rows), strict=True))
            if out is not None:
                slots[f"{attn}.o_proj.{kind}"] = out
        if layer.query_norm is not None and layer.key_norm is not None:
            slots |= {f"{attn}.q_norm.weight": layer.query_norm, f"{attn}.k_norm.weight": layer.key_norm}
        slots |= _dense_slots(layer, mlp) if layer.router is None else _sparse_slots(layer, mlp)
    return slots


def _dense_slots(layer: LayerTensors, mlp: str) -> Slots:
    slots = {}
    for kind, gate_up, down in (
        ("weight", layer.gate_up, layer.down),
        ("bias", layer.gate_up_bias, layer.down_bias),
    ):
        if gate_up is not None and down is not None:
            slots[f"{mlp}.gate_proj.{kind}"], slots[f"{mlp}.up_proj.{kind}"] = gate_up.chunk(2)
            slots[f"{mlp}.down_proj.{kind}"] = down
    return slots


def _sparse_slots(layer: LayerTensors, mlp: str) -> Slots:
    assert layer.router is not None
    slots = {f"{mlp}.gate.weight": layer.router}
    slots |= {f"{mlp}.experts.{_ALL_UP}": layer.gate_up, f"{mlp}.experts.{_ALL_DOWN}": layer.down}
    for index, (gate_up, down) in enumerate(zip(layer.gate_up.unbind(), layer.down.unbind(), strict=True)):
        one = f"{mlp}.experts.{index}"
        slots[f"{one}.gate_proj.weight"], slots[f"{one}.up_proj.weight"] = gate_up.chunk(2)
        slots[f"{one}.down_proj.weight"] = down
    return slots


def _missing(slots: Mapping[str, Tensor], loaded: set[str], shape: DecoderShape) -> set[str]:
    """Names of places that nothing filled. All experts' matrices come as one tensor or each as its own."""
    filled = set(loaded)
    for name in loaded:
        before, _, leaf = name.rpartition(".")
        if leaf in _PARTS_OF and shape.experts is not None:
            filled |= {f"{before}.{index}.{part}" for index in range(shape.experts.num) for part in _PARTS_OF[leaf]}
    wanted = {name for name in slots if name.rpartition(".")[2] not in _PARTS_OF}
    return wanted - filled - ({"lm_head.weight"} if shape.tied else set())
