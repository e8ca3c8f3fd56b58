"""Entry of sampling: checks shapes, chooses by device type. N rows of logits, V vocabulary.

`sample` is for whoever has specs and histories on the host; a device's steps go by what its slots' state says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diptych.protos.constraint import mask_words
from diptych.protos.step import SampleSpec

from ..table import implementation
from .sampled import Sampled
from .space import Asking, SampleSpace

if TYPE_CHECKING:
    from ...device.state import DeviceState


def sample(
    logits_NV: Tensor,
    specs: Sequence[SampleSpec],
    histories: Mapping[int, Tensor] | None = None,
    masks: Mapping[int, Tensor] | None = None,
) -> Sampled:
    """One token per row, after its spec. Rows do not affect each other, and the logits stay as they are.

    `histories`: by row, the sequence's ids so far, int64 of length spec.position, on the device; where rules need them.
    `masks`: by row, what its guide allows, int32 [mask_words(V)], on the device.
    """
    histories, masks = histories or {}, masks or {}
    if logits_NV.dim() != 2 or logits_NV.shape[0] != len(specs):
        raise ValueError(f"sample: logits {tuple(logits_NV.shape)} for {len(specs)} specs")
    for row, mask_W in masks.items():
        if mask_W.shape != (mask_words(logits_NV.shape[1]),) or mask_W.dtype is not torch.int32:
            raise ValueError(f"sample: row {row} has a mask of {tuple(mask_W.shape)} {mask_W.dtype}")
    for row, spec in enumerate(specs):
        if spec.rules is None or not spec.rules.needs_history:
            continue
        known = len(histories[row]) if row in histories else 0
        if known != spec.position:
            raise ValueError(f"sample: row {row} needs the {spec.position} tokens before it and has {known}")
    chosen: Sampled = implementation("sampling", logits_NV.device.type).sample(logits_NV, specs, histories, masks)
    return chosen


def choose_largest(logits_NV: Tensor, space: SampleSpace, tokens_N: Tensor, flags_N: Tensor) -> None:
    """The largest logit of each row, the lowest id among equals, into `tokens_N` (int64); 0 into `flags_N` (int32).
    Where it is not finite, and NaN counts as largest: token 0 and LOGITS_NOT_FINITE. May be captured in a graph.
    """
    rows = len(space.best_N)
    if logits_NV.dim() != 2 or not len(logits_NV) == len(tokens_N) == len(flags_N) <= rows or logits_NV.stride(1) != 1:
        shapes = f"{tuple(logits_NV.shape)} for {len(tokens_N)} tokens and {len(flags_N)} flags"
        raise ValueError(f"choose_largest: logits {shapes}; at most {rows} rows, each contiguous")
    _check_types(tokens_N, flags_N)
    implementation("sampling", logits_NV.device.type).choose_largest(logits_NV, space, tokens_N, flags_N)


def choose_as_asked(
    logits_NV: Tensor, asking: Asking, state: DeviceState, space: SampleSpace, tokens_N: Tensor, flags_N: Tensor
) -> None:
    """After `choose_largest` of these logits: the tokens of rows that ask for more, in place of those, as `sample`
    would choose them. Flags of rows that are not sound stay; RULED_OUT where rules leave no token, which is 0 then.

    A row's place in the logits, tokens and flags is in its row of the wire; earlier tokens are those of its slot.
    """
    told = sum(one.is_told for one in asking.rows)
    if asking.where_A.shape != (told,) or asking.where_A.dtype is not torch.int32:
        raise ValueError(f"choose_as_asked: {tuple(asking.where_A.shape)} rows of the wire for {told} that were told")
    if logits_NV.dim() != 2 or logits_NV.stride(1) != 1 or logits_NV.shape[1] > space.weights_AV.shape[1]:
        raise ValueError(f"choose_as_asked: logits {tuple(logits_NV.shape)}, space for {space.weights_AV.shape[1]}")
    _check_masks(asking, logits_NV.shape[1])
    _check_types(tokens_N, flags_N)
    implementation("sampling", logits_NV.device.type).choose_as_asked(
        logits_NV, asking, state, space, tokens_N, flags_N
    )


def _check_masks(asking: Asking, vocab: int) -> None:
    if asking.masked_A.shape != asking.where_A.shape or asking.masked_A.dtype is not torch.int32:
        numbers = f"{tuple(asking.masked_A.shape)} {asking.masked_A.dtype}"
        raise ValueError(f"choose_as_asked: numbers of masks {numbers} for {tuple(asking.where_A.shape)} rows")
    guided = sum(one.spec.guide is not None for one in asking.rows)
    shape = tuple(asking.masks_MW.shape)
    if len(shape) != 2 or shape[0] < guided or shape[1] != mask_words(vocab) or not asking.masks_MW.is_contiguous():
        wanted = (guided, mask_words(vocab))
        raise ValueError(f"choose_as_asked: masks {shape}, contiguous {wanted} wanted")
    if asking.masks_MW.dtype is not torch.int32:
        raise ValueError(f"choose_as_asked: masks of {asking.masks_MW.dtype}")


def _check_types(tokens_N: Tensor, flags_N: Tensor) -> None:
    if tokens_N.dtype is not torch.int64 or flags_N.dtype is not torch.int32:
        raise ValueError(f"sampling: tokens of {tokens_N.dtype}, flags of {flags_N.dtype}")
