"""Entry of kv_write: checks shapes, chooses by device type. Letters as in reference.py."""

from __future__ import annotations

from torch import Tensor

from ..ragged import RaggedBatch
from ..table import implementation


def kv_write(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch) -> None:
    """Store the row's keys and values into their blocks; the rest of a block that the step opens becomes zero.

    The zeroing keeps leftovers of an earlier sequence (which may be NaN after a fault) out of attention's padded reads.
    """
    num_blocks, kv_heads, block_tokens, head_dim = k_NGBD.shape
    wanted = (batch.num_tokens, kv_heads, head_dim)
    if k_TGD.shape != wanted or v_TGD.shape != wanted or block_tokens != batch.block_tokens:
        raise ValueError(
            f"kv_write: K {tuple(k_TGD.shape)} and V {tuple(v_TGD.shape)} of {batch.num_tokens} tokens do not fit "
            f"blocks of shape {(num_blocks, kv_heads, block_tokens, head_dim)} with {batch.block_tokens} tokens a block"
        )
    implementation("kv_write", k_NGBD.device.type).kv_write(k_TGD, v_TGD, k_NGBD, v_NGBD, batch)
