"""kv_write as indexed stores; letters as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ragged import RaggedBatch


def kv_write(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch) -> None:
    """See reference.py."""
    if batch.opened is not None:
        k_NGBD.index_fill_(0, batch.opened, 0)
        v_NGBD.index_fill_(0, batch.opened, 0)
    _, kv_heads, size, dim = k_NGBD.shape
    rows = batch.once(("write", kv_heads), lambda: _rows(batch, kv_heads, size))
    k_NGBD.view(-1, dim).index_copy_(0, rows, k_TGD.reshape(-1, dim))
    v_NGBD.view(-1, dim).index_copy_(0, rows, v_TGD.reshape(-1, dim))


def _rows(batch: RaggedBatch, kv_heads: int, size: int) -> Tensor:
    """Where each token and KV head goes, [T * G], in the arena seen as rows of D numbers."""
    heads = torch.arange(kv_heads, device=batch.blocks_T.device)
    return ((batch.blocks_T[:, None] * kv_heads + heads) * size + batch.offsets_T[:, None]).reshape(-1)
