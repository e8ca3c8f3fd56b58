"""kv_write as indexed stores; letters as in reference.py."""

from __future__ import annotations

from torch import Tensor

from ..ragged import RaggedBatch


def kv_write(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch) -> None:
    """See reference.py."""
    if batch.opened is not None:
        k_NGBD.index_fill_(0, batch.opened, 0)
        v_NGBD.index_fill_(0, batch.opened, 0)
    # Two indices around a slice: the indexed side has the shape [T, G, D] of the source.
    k_NGBD[batch.blocks_T, :, batch.offsets_T] = k_TGD
    v_NGBD[batch.blocks_T, :, batch.offsets_T] = v_TGD
