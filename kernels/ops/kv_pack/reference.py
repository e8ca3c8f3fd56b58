"""The definition of kv_pack, kv_unpack (one token at a time) and of the checksum of their wire form.

L layers, 2 for K and V, B blocks of the arena, H KV heads, T tokens per block, N tokens of the range, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
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


def checksum(wire: Tensor) -> int:
    """Sum, modulo 2^64 and as a signed number, over the 8-byte words of a wire form of all mixed with their places.

    Words may be added in any order. Guards against what is lost or moved on the way, not against somebody's intent.
    ValueError: the bytes are not whole words.
    """
    raw = wire.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    if raw.size % 8:
        raise ValueError(f"{raw.size} bytes are not whole words of 8")
    words = raw.view(np.uint64)
    places = np.arange(1, words.size + 1, dtype=np.uint64)
    x = words ^ (places * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return int(np.add.reduce(x, dtype=np.uint64).view(np.int64))
