"""A model folder (config.json and safetensors) as a module that computes one ragged row with our attention function.

transformers' model code, built on the meta device; nothing in the folder is executed or unpickled. What a model does
that cannot be computed rightly is found here, by trying it out, and refused with a reason. On a card the families of
models/ are computed by hand-written code, which needs no transformers at all.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.protos.errors import StartupError

from . import attention
from .attention import AttentionStep, Compute, LayerShape, run_module
from .layers.for_device import Swaps, reserve, swap_modules
from .layers.fused_decoder import fuse, is_known
from .layers.merged import MERGED_NAMES, merge_linears
from .layers.packed import pack_linears, packed_memory
from .models import DeviceDecoder
from .models.by_hand import HandWritten, load_by_hand
from .models.generic import GenericDecoder
from .models.shape import GenericOnly, read_shape
from .native.build import why_missing
from .native.pages import use_large_pages
from .ops.linear.cpu import has_blocked_layout
from .ops.paged_attention.launch import refusal
from .ops.ragged import RaggedBatch
from .probe import Probe, compute_alone, compute_ragged, differs, find_layers
from .random_weights import allocate_parameters, random_digest, seeded
from .rope import context_tokens
from .weights import load_weights, weights_digest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BY_HAND_ALONE = "by hand-written decoders alone, not by transformers' forward"
_LARGE_WEIGHTS = 64 << 20  # bytes from which it matters how large the pages of memory are
KvLayers = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A model ready to run. KV layer i of an arena belongs to `layer_ids[i]`, the model's own number of that layer."""

    module: nn.Module | None  # transformers' own, which holds the weights; None: hand-written code does
    compute: Compute | None  # that module's forward, or a fused form of it
    by_hand: HandWritten | None
    layers: int  # that keep KV
    heads: int  # of queries, in the layer that has most
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    dtype: str
    device: torch.device
    weights_digest: bytes  # sha256, see weights.weights_digest
    layer_ids: tuple[int, ...]
    windows: tuple[int | None, ...]  # by KV layer: how many positions a token sees, its own included; None: all
    architecture: str
    weights_bytes: int
    degraded: tuple[str, ...]  # every slower choice that was made, for people
    deterministic: bool = False  # no bit of a request's logits depends on what is computed beside it

    def forward(self, ids_T: Tensor, batch: RaggedBatch, kv: KvLayers, sampled_N: Tensor) -> Tensor:
        """Logits [N, V] after the row indices `sampled_N`; the KV of all tokens is stored on the way. N may be 0.
        Not where the model is hand-written: that has a decoder alone.
        """
        assert self.compute is not None
        return self.compute(ids_T, AttentionStep(batch, kv), sampled_N)

    def decoder(self, *, max_tokens: int) -> DeviceDecoder:
        """What computes steps of up to `max_tokens` tokens on a device; allocates its buffers."""
        if self.by_hand is not None:
            return self.by_hand.decoder(max_tokens=max_tokens, deterministic=self.deterministic)
        assert self.module is not None
        reserve(self.module, max_tokens)
        capturable = refusal(self.head_dim, DTYPES[self.dtype]) is None
        return GenericDecoder(self.module, self.layer_ids, capturable=capturable)


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: str = "cpu",
    random_seed: int | None = None,
    by_hand: bool = True,
    deterministic: bool = False,
) -> LoadedModel:
    """Build and fill the model in `folder`, in "float32" or "bfloat16". StartupError says why a model is refused.

    With `random_seed` the weights are random (see random_weights.py) and config.json is the only file read. On a card
    hand-written code computes the families that it knows, else transformers', which is slower: `degraded` has why.
    Without `by_hand` transformers' computes all, for comparison.

    `deterministic`: the bits of a request's logits depend on its own tokens alone, whatever the batch, its chunks, what
    was cached or computed again. It costs time. StartupError: there is no such form of this model on this device.
    """
    if dtype not in DTYPES:
        raise StartupError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}.")
    place = torch.device(device)
    raw = _read_json(folder)
    if deterministic and place.type != "cuda":
        raise StartupError("deterministic is served on CUDA devices, not on the CPU.")
    if deterministic and not by_hand:
        raise StartupError(f"deterministic is served {_BY_HAND_ALONE}.")
    if place.type != "cuda" or not by_hand:
        return _load_module(folder, dtype=dtype, place=place, random_seed=random_seed)
    try:
        loaded = load_hand_written(folder, raw, dtype=dtype, place=place, random_seed=random_seed)
    except GenericOnly as exc:
        if deterministic:
            raise StartupError(f"deterministic is served {_BY_HAND_ALONE}: {exc}.") from exc
        reason = f"computed by transformers' forward, not by hand-written code: {exc}"
    else:
        if deterministic and loaded.degraded:
            raise StartupError(f"deterministic is served by kernels alone: {'; '.join(loaded.degraded)}.")
        return replace(loaded, deterministic=deterministic)
    loaded = _load_module(folder, dtype=dtype, place=place, random_seed=random_seed)
    return replace(loaded, degraded=(reason, *loaded.degraded))


def load_hand_written(
    folder: Path, config: Mapping[str, Any], *, dtype: str, place: torch.device, random_seed: int | None
) -> LoadedModel:
    """The model as hand-written code computes it; `config` is its config.json. GenericOnly: there is none for it."""
    shape = read_shape(config)
    with torch.inference_mode():
        by_hand = load_by_hand(folder, shape, dtype=DTYPES[dtype], device=place, random_seed=random_seed)
    return hand_written(by_hand, dtype=dtype)


def hand_written(by_hand: HandWritten, *, dtype: str, deterministic: bool = False) -> LoadedModel:
    """What hand-written code has loaded, as a model."""
    shape = by_hand.shape
    return LoadedModel(
        module=None,
        compute=None,
        by_hand=by_hand,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_context_tokens=shape.max_context_tokens,
        dtype=dtype,
        device=by_hand.tensors.embedding.device,
        weights_digest=by_hand.digest,
        layer_ids=tuple(range(shape.layers)),
        windows=shape.windows,
        architecture=shape.architecture,
        weights_bytes=by_hand.tensors.nbytes(),
        degraded=by_hand.slow,
        deterministic=deterministic,
    )


def _load_module(folder: Path, *, dtype: str, place: torch.device, random_seed: int | None) -> LoadedModel:
    config = read_config(folder)
    module = _build(config, DTYPES[dtype])
    with torch.inference_mode():
        if random_seed is None:
            load_weights(
                module,
                folder,
                device=place,
                prefix=getattr(module, "base_model_prefix", "model"),
                ignorable=[
                    *(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()),
                    r"rotary_emb\.inv_freq$",
                ],
            )
            fill_computed_buffers(module, place)
        else:
            allocate_parameters(module, place)
            with seeded(random_seed, place):
                fill_computed_buffers(module, place)
        text = config.get_text_config()
        shapes = find_layers(module, text, place)
        kv_heads, head_dim = _one_geometry(shapes)
        probe = Probe(DTYPES[dtype], place)
        expected = compute_alone(partial(run_module, module), text.vocab_size, shapes, probe)
        degraded, swaps = _swap_modules(module, probe.dtype, place, head_dim)
        compute = _choose_forward(module, text.vocab_size, shapes, probe, expected, degraded, swaps)
    max_context_tokens, shortened = context_tokens(module, text)
    if shortened is not None:
        degraded.append(shortened)
    return LoadedModel(
        module=module,
        compute=compute,
        by_hand=None,
        layers=len(shapes),
        heads=max(shape.heads for shape in shapes.values()),
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        max_context_tokens=max_context_tokens,
        dtype=dtype,
        device=place,
        weights_digest=weights_digest(folder) if random_seed is None else random_digest(folder, random_seed),
        layer_ids=tuple(sorted(shapes)),
        windows=tuple(shapes[layer].window for layer in sorted(shapes)),
        architecture=type(module).__name__,
        weights_bytes=_weights_bytes(module),
        degraded=tuple(degraded),
    )


def _choose_forward(
    module: nn.Module,
    vocab_size: int,
    shapes: dict[int, LayerShape],
    probe: Probe,
    expected: Tensor,
    degraded: list[str],
    swaps: Swaps,
) -> Compute:
    """The fused form where the model has one that computes what transformers does, else transformers' forward, with
    our modules in it as long as that computes the same.
    """
    name = type(module).__name__
    fused = fuse(module, shapes) if probe.device.type == "cpu" else None
    if fused is not None:
        outputs = (one(fused, vocab_size, shapes, probe) for one in (compute_alone, compute_ragged))
        if not any(differs(output, expected, probe.dtype) for output in outputs):
            return fused
        degraded.append(f"{name} runs through transformers' forward: the fused one computes something else")
    generic = partial(run_module, module)
    if swaps.done and differs(compute_alone(generic, vocab_size, shapes, probe), expected, probe.dtype):
        swaps.undo()
        degraded.append(f"{name} keeps its own norms, MLPs and rotation: with ours it computes something else")
    if differs(compute_alone(generic, vocab_size, shapes, probe), expected, probe.dtype):
        raise StartupError(f"{name} is refused: merging its linears changes what it computes.")
    if differs(compute_ragged(generic, vocab_size, shapes, probe), expected, probe.dtype):
        raise StartupError(f"{name} is refused: something other than attention mixes the tokens of a step.")
    return generic


def _swap_modules(
    module: nn.Module, dtype: torch.dtype, device: torch.device, head_dim: int
) -> tuple[list[str], Swaps]:
    """Put faster modules in place of the model's own; gives what had to stay."""
    degraded = []
    fusable = is_known(module) and device.type == "cpu"
    unmerged = merge_linears(module, MERGED_NAMES[:1] if fusable else MERGED_NAMES)
    if unmerged:
        degraded.append(f"{len(unmerged)} groups of linears are not merged, the first is {unmerged[0]}")
    if dtype is torch.bfloat16 and device.type == "cpu" and not has_blocked_layout():
        degraded.append("bfloat16 weights are not prepacked: this torch or CPU has no oneDNN for them")
    if device.type == "cpu" and (reason := why_missing()) is not None:
        degraded.append(f"decoding is slower, without native code: {reason}")
    if device.type == "cuda" and (reason := refusal(head_dim, dtype)) is not None:
        degraded.append(reason)
    swaps = swap_modules(module) if device.type == "cuda" else Swaps()
    degraded += swaps.left
    copied = pack_linears(module)
    if device.type == "cpu":
        if copied:
            _leave_files(module)
        memory = packed_memory(module)
        moved, size = use_large_pages(memory), sum(memory.values())
        if size >= _LARGE_WEIGHTS and moved < size // 2:
            degraded.append(
                f"of {size >> 20} MiB of weights, {moved >> 20} lie in large pages "
                "(Linux moves memory there from 6.1 on, mapped files not)"
            )
    return degraded, swaps


def _leave_files(module: nn.Module) -> None:
    """Copy what was not packed, where that is less than what was: a single norm's weight that lies in a mapped file
    keeps the whole file in memory, 257 MiB for SmolLM2.
    """
    memory, kept = packed_memory(module), [*module.parameters(), *module.buffers()]
    if sum(tensor.nbytes for tensor in kept) < sum(memory.values()):
        for tensor in kept:
            if tensor.data_ptr() not in memory:
                tensor.data = tensor.data.clone()


def _read_json(folder: Path) -> dict[str, Any]:
    """config.json of a model that may be loaded at all."""
    path = folder / "config.json"
    if not path.is_file():
        raise StartupError(f"{folder} has no config.json.")
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise StartupError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise StartupError(f"{path} is not a JSON object.")
    for key, reason in (
        ("auto_map", "it asks for Python code from the model's folder, which is never executed"),
        ("quantization_config", "quantised weights are not supported"),
    ):
        if raw.get(key):
            raise StartupError(f"The model in {folder} is refused: {key} in config.json, {reason}.")
    return raw


def read_config(folder: Path) -> Any:
    """transformers' configuration of the model in `folder`. Raises StartupError."""
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as exc:
        raise StartupError(f"transformers cannot read {path}: {exc}") from exc


def _build(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    attention.register()
    try:
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            module: nn.Module = build(
                config, dtype=dtype, attn_implementation=attention.IMPLEMENTATION, trust_remote_code=False
            )
    except (ValueError, KeyError) as exc:
        raise StartupError(f"transformers cannot build a causal model of type {config.model_type}: {exc}") from exc
    if "logits_to_keep" not in inspect.signature(module.forward).parameters:
        raise StartupError(f"{type(module).__name__} cannot limit its logits to given positions.")
    return module.eval()


def fill_computed_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds (rotary frequencies and the like) come from the model's own initialisation. Raises
    StartupError.

    They are NaN before, so that a buffer which the initialisation forgets is found here and not in the answers.
    """
    computed = []
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner_name, _, leaf = name.rpartition(".")
            fresh = torch.empty_like(buffer, device=device)
            if fresh.is_floating_point():
                fresh.fill_(float("nan"))
                computed.append(name)
            module.get_submodule(owner_name)._buffers[leaf] = fresh
    module.initialize_weights()  # type: ignore[operator]
    buffers = dict(module.named_buffers())
    bad = [name for name in computed if bool(buffers[name].isnan().any())]
    bad += [name for name, tensor in (*buffers.items(), *module.named_parameters()) if tensor.is_meta]
    if bad:
        raise StartupError(f"{type(module).__name__} does not initialise {', '.join(bad[:8])}.")


def _one_geometry(shapes: Mapping[int, attention.LayerShape]) -> tuple[int, int]:
    geometries = {(shape.kv_heads, shape.head_dim) for shape in shapes.values()}
    if len(geometries) != 1:
        raise StartupError(
            f"The layers differ in KV heads and head size, which is not supported: {sorted(geometries)}."
        )
    return geometries.pop()


def _weights_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each storage once, and of packed weights, which are no parameters."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum((storages | packed_memory(module)).values())
