"""The definition of kv_pack and kv_unpack: one token at a time.

L layers, 2 for K and V, B blocks of the arena, H KV heads, T tokens per block, N tokens of the range, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pack(arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, out_L2HND: Tensor) -> None:
    """Copy positions tok_from .. tok_from + N - 1 of the sequence in `blocks` into `out_L2HND`."""
    block_tokens = arena_L2BHTD.shape[4]
    for at in range(out_L2HND.shape[3]):
        block, offset = divmod(tok_from + at, block_tokens)
        out_L2HND[:, :, :, at] = arena_L2BHTD[:, :, blocks[block], :, offset]


def unpack(arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, data_L2HND: Tensor) -> None:
    """Copy `data_L2HND` to positions tok_from .. tok_from + N - 1 of the sequence in `blocks`; nothing else changes."""
    block_tokens = arena_L2BHTD.shape[4]
    for at in range(data_L2HND.shape[3]):
        block, offset = divmod(tok_from + at, block_tokens)
        arena_L2BHTD[:, :, blocks[block], :, offset] = data_L2HND[:, :, :, at]
