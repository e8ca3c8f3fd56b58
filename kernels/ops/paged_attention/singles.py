"""Attention of sequences with one new token each, on a CPU: native code reads keys and values where they lie.

Letters as in reference.py; S sequences with one new token.
"""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from ...native.build import AttentionArguments, check, library, most_head_dim
from ..ragged import RaggedBatch
from .params import AttentionParams

_FUNCTIONS = {torch.float32: "attend_f32", torch.bfloat16: "attend_bf16"}


def can_attend(q_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor) -> bool:
    """Whether there is native code for these."""
    return (
        q_THD.dtype is k_NGBD.dtype is v_NGBD.dtype
        and q_THD.dtype in _FUNCTIONS
        and q_THD.shape[2] <= most_head_dim()
        and k_NGBD.is_contiguous()
        and v_NGBD.is_contiguous()
    )


@dataclass(frozen=True, slots=True, eq=False)
class Singles:
    """The sequences of a step with one new token. `arguments` point into `arrays`; they are completed by each layer."""

    arguments: AttentionArguments
    arrays: tuple[array[int], ...]  # blocks of all, first block of each, context length, row

    @classmethod
    def find(cls, batch: RaggedBatch) -> Singles | None:
        """None where no sequence has a single new token."""
        blocks, first, ends, rows = (array("q") for _ in range(4))
        for segment in batch.segments:
            if segment.num_tokens == 1:
                first.append(len(blocks))
                blocks.extend(segment.blocks[: -(-segment.end // batch.block_tokens)])
                ends.append(segment.end)
                rows.append(segment.first)
        if not rows:
            return None
        arrays = (blocks, first, ends, rows)
        places = (part.buffer_info()[0] for part in arrays)
        return cls(AttentionArguments(*places, sequences=len(rows), block_tokens=batch.block_tokens), arrays)

    def attend(self, q_THD: Tensor, out_THD: Tensor, k_NGBD: Tensor, v_NGBD: Tensor, params: AttentionParams) -> None:
        """Fill the rows of these sequences in `out_THD`, which is contiguous. IndexError: K and V lack a block."""
        if q_THD.stride()[1:] != (q_THD.shape[2], 1):
            q_THD = q_THD.contiguous()
        sinks_H = None if params.sinks_H is None else params.sinks_H.float().contiguous()
        given = self.arguments
        given.query_stride = q_THD.stride(0)
        given.window = params.window or 0
        given.sinks = None if sinks_H is None else sinks_H.data_ptr()
        _, given.heads, given.head_dim = q_THD.shape
        given.num_blocks, given.kv_heads = k_NGBD.shape[:2]
        given.scaling = params.scaling
        given.softcap = params.softcap or 0.0
        function = getattr(library(), _FUNCTIONS[q_THD.dtype])
        tensors = (q_THD.data_ptr(), out_THD.data_ptr(), k_NGBD.data_ptr(), v_NGBD.data_ptr())
        check(function(*tensors, ctypes.byref(given), torch.get_num_threads()))
