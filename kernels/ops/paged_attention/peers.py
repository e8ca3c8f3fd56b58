"""Attention by others over the same inputs, for bench.py: torch's own; FlashAttention and FlashInfer where installed.

FlashAttention 3 is `flash_attn_interface`, 2 is `flash_attn`; the latter takes blocks of 256 tokens alone and is left
out where rows decode. Nothing of the project but the measurement imports any of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..cases import Peer
from .testing import PagedStep

_WORKSPACE = 128 << 20  # bytes that FlashInfer asks for


def prompt_peers() -> Mapping[str, Callable[..., object]]:
    """Of one prompt without anything before it."""
    found: dict[str, Callable[..., object]] = {"torch": _torch}
    if _has("flash_attn"):
        found["flash_attn 2"] = _flash_2
    if _has("flash_attn_interface"):
        found["flash_attn 3"] = _flash_3
    return found


def decode_peers() -> Mapping[str, Peer]:
    """Of rows with one new token each."""
    found = {}
    if _has("flash_attn_interface"):
        found["flash_attn 3"] = Peer(prepare=_pages, run=_flash_3_pages)
    if _has("flashinfer"):
        found["flashinfer"] = Peer(prepare=_planned, run=_flashinfer)
    return found


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _torch(made: PagedStep, out_THD: Tensor) -> Any:
    """cuDNN, or FlashAttention 2 as torch has it."""
    q, k, v = (part.transpose(0, 1)[None] for part in (made.q_THD, *made.view))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _flash_2(made: PagedStep, out_THD: Tensor) -> Any:
    flash: Any = importlib.import_module("flash_attn")
    return flash.flash_attn_func(*(part[None] for part in (made.q_THD, *made.view)), causal=True)


def _flash_3(made: PagedStep, out_THD: Tensor) -> Any:
    flash: Any = importlib.import_module("flash_attn_interface")
    return flash.flash_attn_func(*(part[None] for part in (made.q_THD, *made.view)), causal=True)


def _pages(made: PagedStep, out_THD: Tensor) -> tuple[Tensor, ...]:
    """Queries [rows, 1, H, D]; blocks [N, B, G, D], views; lengths; each row's blocks."""
    step = made.step
    table_RB = step.blocks_SB[step.slot_R.long()].contiguous()
    k_NBGD, v_NBGD = made.k_NGBD.transpose(1, 2), made.v_NGBD.transpose(1, 2)
    return made.q_THD[:, None], k_NBGD, v_NBGD, step.seq_len_R, table_RB


def _flash_3_pages(q: Tensor, k_NBGD: Tensor, v_NBGD: Tensor, length_R: Tensor, table_RB: Tensor) -> Any:
    flash: Any = importlib.import_module("flash_attn_interface")
    return flash.flash_attn_with_kvcache(q, k_NBGD, v_NBGD, cache_seqlens=length_R, page_table=table_RB, causal=True)


def _planned(made: PagedStep, out_THD: Tensor) -> tuple[Any, ...]:
    """A wrapper that knows the rows' blocks, the queries, and the blocks as they lie."""
    flashinfer: Any = importlib.import_module("flashinfer")
    step, (_, kv_heads, size, dim) = made.step, made.k_NGBD.shape
    counts = [-(-(start + num) // size) for start, num in made.rows]
    table_RB = step.blocks_SB[step.slot_R.long()]
    indices = torch.cat([table_RB[row, :count] for row, count in enumerate(counts)])
    indptr = torch.tensor([0, *counts], dtype=torch.int32, device=indices.device).cumsum(0).int()
    last = (step.seq_len_R - 1) % size + 1
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(_WORKSPACE, dtype=torch.uint8, device=indices.device), "HND"
    )
    heads = made.q_THD.shape[1]
    dtype = made.k_NGBD.dtype
    wrapper.plan(indptr, indices, last, heads, kv_heads, dim, size, q_data_type=dtype, kv_data_type=dtype)
    return wrapper, made.q_THD.contiguous(), made.k_NGBD, made.v_NGBD


def _flashinfer(wrapper: Any, q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor) -> Any:
    return wrapper.run(q_THD, (k_NGBD, v_NGBD))
