"""Choosing a step's tokens by what the host knows of its rows: the definition of what a card does by what it was told,
and a CPU's way. Asks the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...device.step import LOGITS_NOT_FINITE, RULED_OUT
from .launch import sample
from .space import Asking, SampleSpace

if TYPE_CHECKING:
    from ...device.state import DeviceState
    from ...device.wire import Sampling


def choose_largest(logits_NV: Tensor, space: SampleSpace, tokens_N: Tensor, flags_N: Tensor) -> None:
    """See launch.py."""
    best_N, found_N = logits_NV.max(dim=-1)
    is_sound_N = torch.isfinite(best_N)
    tokens_N.copy_(torch.where(is_sound_N, found_N, 0))
    flags_N.copy_(torch.where(is_sound_N, 0, LOGITS_NOT_FINITE))


def choose_as_asked(
    logits_NV: Tensor, asking: Asking, state: DeviceState, space: SampleSpace, tokens_N: Tensor, flags_N: Tensor
) -> None:
    """See launch.py."""
    choose_by_spec(logits_NV, asking.rows, asking.masks_of(asking.rows), state, tokens_N, flags_N)


def choose_by_spec(
    logits_NV: Tensor,
    rows: Sequence[Sampling],
    masks: Mapping[int, Tensor],
    state: DeviceState,
    tokens_N: Tensor,
    flags_N: Tensor,
) -> None:
    """What each row's spec and mask, by number, say. Earlier tokens, where rules look at them, are those of the slot's
    state.
    """
    histories = {
        # A token that was never sampled is -1; its row is faulty whatever it draws.
        at: state.tokens_SC[one.slot, : one.spec.position].long().clamp(min=0)
        for at, one in enumerate(rows)
        if one.spec.rules is not None and one.spec.rules.needs_history
    }
    places = torch.tensor([one.place for one in rows], device=logits_NV.device)
    chosen = sample(logits_NV[places], [one.spec for one in rows], histories, masks)
    unsound_N = torch.where(chosen.ruled_out_N, RULED_OUT, LOGITS_NOT_FINITE)
    tokens_N[places] = chosen.tokens_N
    flags_N[places] = torch.where(chosen.sound_N, 0, unsound_N).int()
