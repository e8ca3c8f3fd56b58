"""rotate on a card: one launch of kernel.py. Hand-written decoders rotate in qk_write."""

from __future__ import annotations

from torch import Tensor

from ..compiled import launch
from . import reference
from .kernel import rotate_heads

_NUMBERS = 1024  # of a program


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """See reference.py. Heads that lie apart by the number of tokens are torch's: each number would be a variant."""
    tokens, heads, dim = x_THD.shape
    row, head, one = x_THD.stride()
    if one != 1 or head > row or not (cos_TD.is_contiguous() and sin_TD.is_contiguous()):
        reference.rotate(x_THD, cos_TD, sin_TD)
        return
    each = 1 << (max(1, min(_NUMBERS // dim, heads)) - 1).bit_length()
    launch(
        rotate_heads,
        (tokens, -(-heads // each), 1),
        (x_THD, cos_TD, sin_TD),
        num_warps=4 if each * dim >= _NUMBERS // 2 else 1,
        num_stages=1,
        ROW=row,
        HEAD=head,
        H=heads,
        P=dim // 2,
        WIDE=1 << (dim // 2 - 1).bit_length(),
        HEADS=each,
    )
