"""Which token each row of logits gives, into static memory: the largest logit for all rows, which a graph may hold, and
the op `sampling` for rows that ask for more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.sampling.launch import sample
from .state import DeviceState
from .step import LOGITS_NOT_FINITE, RULED_OUT
from .wire import Sampling


def choose_greedily(logits_NV: Tensor, tokens_N: Tensor, flags_N: Tensor) -> None:
    """The largest logit of each row, the lowest id among equals. NaN counts as largest, and is no sound choice."""
    best_N, found_N = logits_NV.max(dim=-1)
    tokens_N.copy_(found_N)
    flags_N.copy_(~torch.isfinite(best_N))
    flags_N.mul_(LOGITS_NOT_FINITE)


def choose_by_spec(
    logits_NV: Tensor, asking: Sequence[Sampling], state: DeviceState, tokens_N: Tensor, flags_N: Tensor
) -> None:
    """What each row's spec says. Earlier tokens, where rules look at them, are those of the slot's state."""
    specs = [one.spec for one in asking]
    histories = {
        # A token that was never sampled is -1; its row is faulty whatever it draws.
        at: state.tokens_SC[one.slot, : one.spec.position].long().clamp(min=0)
        for at, one in enumerate(asking)
        if one.spec.rules is not None and one.spec.rules.needs_history
    }
    places = torch.tensor([one.place for one in asking], device=logits_NV.device)
    chosen = sample(logits_NV[places], specs, histories)
    unsound_N = torch.where(chosen.ruled_out_N, RULED_OUT, LOGITS_NOT_FINITE)
    tokens_N[places] = chosen.tokens_N
    flags_N[places] = torch.where(chosen.sound_N, 0, unsound_N).int()
