"""Definition of kv_write: token by token. T tokens, G KV heads, N blocks, B tokens a block, D head size."""

from __future__ import annotations

from torch import Tensor

from ..ragged import RaggedBatch


def kv_write(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch) -> None:
    """Zero the blocks that the step opens, then store each token's keys and values at its place."""
    for block in batch.opened.tolist() if batch.opened is not None else []:
        k_NGBD[block] = 0
        v_NGBD[block] = 0
    for token, (block, offset) in enumerate(zip(batch.blocks_T.tolist(), batch.offsets_T.tolist(), strict=True)):
        k_NGBD[block, :, offset] = k_TGD[token]
        v_NGBD[block, :, offset] = v_TGD[token]
