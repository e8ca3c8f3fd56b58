"""kv_write on a CPU: one call of native code, else indexed stores; letters as in reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...native.build import KvShape, check, library
from ..ragged import RaggedBatch

_FUNCTIONS = {torch.float32: "kv_write_f32", torch.bfloat16: "kv_write_bf16"}


def kv_write(k_TGD: Tensor, v_TGD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, batch: RaggedBatch) -> None:
    """See reference.py."""
    if batch.opened is not None:
        k_NGBD.index_fill_(0, batch.opened, 0)
        v_NGBD.index_fill_(0, batch.opened, 0)
    num_blocks, kv_heads, size, dim = k_NGBD.shape
    alike = (
        k_TGD.dtype is v_TGD.dtype is k_NGBD.dtype is v_NGBD.dtype
        and k_TGD.stride()[1:] == v_TGD.stride()[1:] == (dim, 1)
        and k_NGBD.is_contiguous()
        and v_NGBD.is_contiguous()
    )
    if alike and k_TGD.dtype in _FUNCTIONS and k_TGD.device.type == "cpu" and (native := library()) is not None:
        shape = KvShape(k_TGD.shape[0], kv_heads, dim, num_blocks, size, k_TGD.stride(0), v_TGD.stride(0))
        tensors = (k_TGD, v_TGD, k_NGBD, v_NGBD, batch.blocks_T, batch.offsets_T)
        check(getattr(native, _FUNCTIONS[k_TGD.dtype])(*(tensor.data_ptr() for tensor in tensors), ctypes.byref(shape)))
        return
    rows = batch.once(("write", kv_heads), lambda: _rows(batch, kv_heads, size))
    k_NGBD.view(-1, dim).index_copy_(0, rows, k_TGD.reshape(-1, dim))
    v_NGBD.view(-1, dim).index_copy_(0, rows, v_TGD.reshape(-1, dim))


def _rows(batch: RaggedBatch, kv_heads: int, size: int) -> Tensor:
    """Where each token and KV head goes, [T * G], in the arena seen as rows of D numbers."""
    heads = torch.arange(kv_heads, device=batch.blocks_T.device)
    return ((batch.blocks_T[:, None] * kv_heads + heads) * size + batch.offsets_T[:, None]).reshape(-1)
