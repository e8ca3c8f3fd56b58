"""Logprobs on a CPU: rows in pieces, so that memory stays small, and no sort of the whole vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .columns import Logprobs

PIECE = 8  # rows: 1.5 MiB of float32 at 49,152 tokens, which the cache holds; a prompt's chunk has 512 rows


def logprobs(logits_NV: Tensor, rows_R: Tensor, tokens_R: Tensor, most: int) -> Logprobs:
    """See reference.py."""
    num_rows, vocab = len(rows_R), logits_NV.shape[1]
    most = min(most, vocab)
    own_R, ranks_R = np.empty(num_rows, np.float32), np.ones(num_rows, np.int64)
    ids_RK, values_RK = np.zeros((num_rows, most), np.int64), np.full((num_rows, most), np.nan, np.float32)
    tokens = tokens_R.tolist()
    for begin in range(0, num_rows, PIECE):
        piece_PV = torch.log_softmax(logits_NV[rows_R[begin : begin + PIECE]].float(), dim=-1).numpy()
        for row, row_V in enumerate(piece_PV, begin):
            own = own_R[row] = row_V[tokens[row]]
            if np.isnan(own):  # then all are
                continue
            ranks_R[row] = np.count_nonzero(row_V > own) + 1
            if most:
                pivot = np.partition(row_V, vocab - most)[vocab - most]
                ids = np.flatnonzero(row_V >= pivot)  # more than `most` where several equal the last
                ids_RK[row] = best = ids[np.argsort(-row_V[ids], kind="stable")[:most]]
                values_RK[row] = row_V[best]
    columns = (own_R, ranks_R, ids_RK, values_RK)
    return Logprobs(*(torch.from_numpy(column) for column in columns))
