"""Rotary embedding as a table by position, made once from a model's own module: whatever scaling it uses is in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class RopeTable:
    """Cosine and sine of the angle by which each pair of a head's numbers is turned at each position.

    float32 [C, P], C positions, P pairs: number i of a head and number P + i are a pair; what lies behind 2 P stays.
    """

    cos_CP: Tensor
    sin_CP: Tensor

    @property
    def rotated(self) -> int:
        """How many numbers at the beginning of a head are turned: 2 P."""
        return 2 * self.cos_CP.shape[1]

    @classmethod
    def of(cls, rotary: nn.Module, context_tokens: int, device: torch.device) -> RopeTable:
        """From a transformers rotary module: called once with all positions, in float32. The module must not choose
        its frequencies by the longest position given (rope.py tells the context within which it does not).
        """
        positions = torch.arange(context_tokens, device=device)[None]
        with torch.inference_mode():
            cos_1CD, sin_1CD = rotary(torch.empty(1, dtype=torch.float32, device=device), position_ids=positions)
        pairs = cos_1CD.shape[2] // 2
        return cls(*(table[0, :, :pairs].float().contiguous() for table in (cos_1CD, sin_1CD)))
