"""Entry of paged attention: checks shapes, chooses by device type. Letters as in reference.py."""

from __future__ import annotations

from torch import Tensor

from ..ragged import RaggedBatch
from ..table import implementation
from .params import AttentionParams


def paged_attention(
    q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch, params: AttentionParams
) -> Tensor:
    """Attend each token to positions 0 .. its own of its sequence, whose KV lies in blocks already: [T, H, D].

    K and V are contiguous. Positions after a sequence's end in its last block must be finite, as kv_write leaves them.
    """
    num_tokens, heads, dim = q_THD.shape
    _, kv_heads, block_tokens, kv_dim = k_NGBD.shape
    if (
        num_tokens != batch.num_tokens
        or heads % kv_heads
        or dim != kv_dim
        or block_tokens != batch.block_tokens
        or v_NGBD.shape != k_NGBD.shape
    ):
        raise ValueError(
            f"paged_attention: queries {tuple(q_THD.shape)} of {batch.num_tokens} tokens do not fit blocks K "
            f"{tuple(k_NGBD.shape)} V {tuple(v_NGBD.shape)} with {batch.block_tokens} tokens a block"
        )
    chosen = implementation("paged_attention", q_THD.device.type)
    return chosen.paged_attention(q_THD, k_NGBD, v_NGBD, batch, params)  # type: ignore[no-any-return]
