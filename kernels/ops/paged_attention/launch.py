"""Entry of paged attention: checks shapes, chooses by device type. Letters as in reference.py; R rows.

`paged_attention` takes a step as lists of segments, `attend` as tensors on the device (see device/step.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ragged import RaggedBatch
from ..table import implementation
from .params import AttentionParams
from .split import plan_splits

if TYPE_CHECKING:
    from ...device.step import StepTensors

__all__ = ["QkvView", "attend", "paged_attention", "plan_splits", "refusal"]

_LARGEST_HEAD = 256  # a tile of keys and values beyond does not fit a multiprocessor's shared memory
_HEAD_UNIT = 8  # heads are read 16 bytes at a time, in bfloat16


class QkvView(NamedTuple):
    """Keys and values of the step's own tokens where the projection left them, keys rotated: read from there, new
    tokens need not be collected from blocks.
    """

    k_TGD: Tensor
    v_TGD: Tensor

    @classmethod
    def of(cls, qkv_TN: Tensor, kv_heads: int, head_dim: int) -> QkvView:
        """Of rows [queries, keys, values], N = (H + 2 G) D numbers each."""
        size = kv_heads * head_dim
        k_TN, v_TN = qkv_TN[:, -2 * size : -size], qkv_TN[:, -size:]
        shape = (qkv_TN.shape[0], kv_heads, head_dim)
        return cls(k_TN.view(shape), v_TN.view(shape))


def refusal(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why `attend` computes such a model by its slow definition on a card, for the list of what is degraded."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"attention has no kernel for {dtype}"
    if head_dim > _LARGEST_HEAD or head_dim % _HEAD_UNIT:
        return f"attention has kernels for head sizes up to {_LARGEST_HEAD} in steps of {_HEAD_UNIT}, not {head_dim}"
    return None


def attend(
    q_THD: Tensor,
    qkv: QkvView | None,
    k_NGBD: Tensor,
    v_NGBD: Tensor,
    step: StepTensors,
    params: AttentionParams,
    out_THD: Tensor,
) -> None:
    """Attend each token to positions 0 .. its own of its sequence, whose KV lies in blocks, the step's own included.

    Prompts read the step's own keys and values from `qkv` where given, else from the blocks. With an invariant work
    list all is read from the blocks, and the bits of a row depend on its own tokens alone. `out_THD` is contiguous.
    What the blocks hold behind a sequence's end is never read. ValueError: shapes or layouts that do not fit.
    """
    num_tokens, heads, dim = q_THD.shape
    _, kv_heads, block_tokens, kv_dim = k_NGBD.shape
    if (
        num_tokens != step.num_tokens
        or heads % kv_heads
        or dim != kv_dim
        or block_tokens != step.block_tokens
        or v_NGBD.shape != k_NGBD.shape
        or out_THD.shape != q_THD.shape
        or not q_THD.dtype is k_NGBD.dtype is v_NGBD.dtype is out_THD.dtype
    ):
        raise ValueError(
            f"attend: queries {tuple(q_THD.shape)} {q_THD.dtype} and results {tuple(out_THD.shape)} {out_THD.dtype} of "
            f"{step.num_tokens} tokens do not fit blocks K {tuple(k_NGBD.shape)} {k_NGBD.dtype} V "
            f"{tuple(v_NGBD.shape)} with {step.block_tokens} tokens a block"
        )
    if q_THD.stride(2) != 1 or not (out_THD.is_contiguous() and k_NGBD.is_contiguous() and v_NGBD.is_contiguous()):
        raise ValueError("attend: blocks and results must be contiguous, and so must each head of the queries")
    if qkv is not None and not qkv.k_TGD.shape == qkv.v_TGD.shape == (num_tokens, kv_heads, dim):
        raise ValueError(
            f"attend: the step's keys {tuple(qkv.k_TGD.shape)} and values {tuple(qkv.v_TGD.shape)} are not "
            f"{(num_tokens, kv_heads, dim)}"
        )
    if params.scaling <= 0:
        raise ValueError(f"attend: scaling {params.scaling} is not positive")
    module = implementation("paged_attention", q_THD.device.type)
    module.attend(q_THD, qkv, k_NGBD, v_NGBD, step, params, out_THD)


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
