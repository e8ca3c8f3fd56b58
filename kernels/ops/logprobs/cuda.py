"""The op on a card: three launches for any number of rows, and nothing that asks the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiled import launch
from . import reference
from .columns import Logprobs
from .kernel import rank_tiles, sum_tiles, tell_rows

_TILE = 4096  # tokens
_MOST = 32  # alternatives; more are sorted out by torch, which takes 5 ms for 64 rows of 128,256 tokens


def logprobs(logits_NV: Tensor, rows_R: Tensor, tokens_R: Tensor, most: int, *, tile: int = _TILE) -> Logprobs:
    """See launch.py."""
    vocab = logits_NV.shape[1]
    most = min(most, vocab)
    if most > _MOST:
        return reference.logprobs(logits_NV, rows_R, tokens_R, most)
    rows, tiles = len(rows_R), -(-vocab // tile)
    parts = max(2, 1 << (tiles - 1).bit_length())

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_NV.device)

    best_RP, sums_RP = empty(rows, parts, dtype=torch.float32), empty(rows, parts, dtype=torch.float64)
    above_RP, keys_RPK = empty(rows, parts, dtype=torch.int32), empty(rows, parts, _MOST, dtype=torch.int64)
    own_R, ranks_R = empty(rows, dtype=torch.float32), empty(rows, dtype=torch.int64)
    ids_RK, values_RK = empty(rows, most, dtype=torch.int64), empty(rows, most, dtype=torch.float32)
    stride = logits_NV.stride(0)
    launch(
        sum_tiles,
        (rows, tiles, 1),
        (logits_NV, rows_R, best_RP, sums_RP),
        num_warps=8,
        STRIDE=stride,
        V=vocab,
        SP=parts,
        TILE=tile,
    )
    normal = (best_RP, sums_RP, above_RP, keys_RPK)
    launch(
        rank_tiles,
        (rows, tiles, 1),
        (logits_NV, rows_R, tokens_R, *normal, most),
        num_warps=8,
        STRIDE=stride,
        V=vocab,
        SP=parts,
        KP=_MOST,
        TILE=tile,
    )
    launch(
        tell_rows,
        (rows, 1, 1),
        (logits_NV, rows_R, tokens_R, *normal, own_R, ranks_R, ids_RK, values_RK, tiles, most),
        STRIDE=stride,
        SP=parts,
        KP=_MOST,
    )
    return Logprobs(own_R, ranks_R, ids_RK, values_RK)
