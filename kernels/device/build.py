"""A loaded model and an arena, made into the runner of their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..model import LoadedModel
from ..ops.paged_attention.split import allocate
from .runner import DeviceOptions, DeviceRunner, max_step_rows
from .state import DeviceState


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What the steps of an engine can ask for at most."""

    max_slots: int
    max_step_tokens: int
    max_context_tokens: int
    block_tokens: int


def build_runner(
    model: LoadedModel, kv: Sequence[tuple[Tensor, Tensor]], limits: StepLimits, options: DeviceOptions
) -> DeviceRunner:
    """`kv`: K and V of each layer, [blocks + 1, kv_heads, block_tokens, head_dim] in the model's dtype, on its device;
    the last block is no sequence's. The runner is not warm yet.
    """
    wanted = (model.kv_heads, limits.block_tokens, model.head_dim)
    if len(kv) != model.layers:
        raise ValueError(f"the model keeps KV in {model.layers} layers, the arena has {len(kv)}")
    first = kv[0][0]
    for tensor in (tensor for pair in kv for tensor in pair):
        if tensor.shape != (first.shape[0], *wanted) or not tensor.is_contiguous() or tensor.device != first.device:
            raise ValueError(f"arena blocks of shape {tuple(tensor.shape[1:])} instead of contiguous {wanted}")
        if str(tensor.dtype) != f"torch.{model.dtype}":
            raise ValueError(f"the arena holds {tensor.dtype}, the model computes in {model.dtype}")
    state = DeviceState(
        max_slots=limits.max_slots,
        max_context_tokens=limits.max_context_tokens,
        block_tokens=limits.block_tokens,
        spare_block=first.shape[0] - 1,
        device=first.device,
        vocab_size=model.vocab_size,
    )
    splits = None
    if first.is_cuda or model.deterministic:
        splits = allocate(
            max_rows=max_step_rows(limits.max_slots),
            max_tokens=limits.max_step_tokens,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            windows=model.windows,
            like=first,
            invariant=model.deterministic,
        )
    return DeviceRunner(
        model.decoder(max_tokens=limits.max_step_tokens),
        kv,
        state=state,
        splits=splits,
        max_step_tokens=limits.max_step_tokens,
        vocab_size=model.vocab_size,
        options=options,
    )
