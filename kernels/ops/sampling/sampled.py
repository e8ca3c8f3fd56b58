"""What sampling gives: columns on the device, so that nobody has to wait for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """N sampled rows."""

    tokens_N: Tensor  # int64; 0 where the row is not sound
    sound_N: Tensor  # bool; False: the row's logits are not finite numbers, or its rules leave no token
    ruled_out_N: Tensor  # bool; True: the latter, of a row whose logits are finite before them
