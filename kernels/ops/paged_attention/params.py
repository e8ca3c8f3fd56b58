"""What distinguishes one layer's attention from another's, beside its tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionParams(NamedTuple):
    """`window`: a token sees itself and the window - 1 tokens before it. `softcap`: scores become cap * tanh(s / cap).

    `sinks_H`: one logit per query head that takes part in the softmax and contributes no value.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None
