"""kv_pack and kv_unpack for an arena on a card; the wire lies there, too, or in the host's memory. See reference.py.

The stream that computed the KV must have been waited for: a copy to or from the host runs on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compiled import launch
from .kernel import copy_heads
from .staging import staging

_WORD = 8  # bytes
_PROGRAM_WORDS = 2048


def takes(arena_L2BHTD: Tensor) -> bool:
    """Whether there is a kernel for it: a head of a token must consist of whole words, and all lie close together."""
    return arena_L2BHTD.is_contiguous() and arena_L2BHTD.shape[5] * arena_L2BHTD.element_size() % _WORD == 0


def pack(
    arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, out_L2HND: Tensor, checksum: Tensor | None
) -> None:
    """As reference.pack. `checksum`: int64 [1] on the card, to which that of the wire is added."""
    _move(arena_L2BHTD, blocks, tok_from, out_L2HND, checksum, scatter=False)


def unpack(
    arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, data_L2HND: Tensor, checksum: Tensor | None
) -> None:
    """As reference.unpack; checksum as above."""
    _move(arena_L2BHTD, blocks, tok_from, data_L2HND, checksum, scatter=True)


def _move(
    arena: Tensor, blocks: Sequence[int], tok_from: int, wire: Tensor, checksum: Tensor | None, *, scatter: bool
) -> None:
    if wire.numel() == 0:
        return
    if not wire.is_contiguous():
        raise ValueError(f"the wire form must be contiguous, not of strides {wire.stride()}")
    copy = copier(arena, tok_from, wire.shape[3], checksum, scatter=scatter)
    flat = wire.view(-1).view(torch.int64)
    planes = 2 * arena.shape[0]
    if wire.is_cuda:
        copy(flat, torch.tensor(blocks, dtype=torch.int32).to(arena.device), 0, planes)
        return
    plane = flat.numel() // planes
    found, runs = staging(arena.device, plane)
    pieces = [(at * plane, min(runs, planes - at) * plane) for at in range(0, planes, runs)]
    with torch.cuda.device(arena.device), torch.cuda.stream(found.stream):
        table = torch.tensor(blocks, dtype=torch.int32).to(arena.device)

        def piece(index: int, buffer: Tensor) -> None:
            copy(buffer, table, index * runs, pieces[index][1] // plane)

        (found.send if scatter else found.fetch)(flat, pieces, piece)


def copier(
    arena: Tensor, tok_from: int, num_tokens: int, checksum: Tensor | None, *, scatter: bool
) -> Callable[[Tensor, Tensor, int, int], None]:
    """copy(wire of these planes, block ids, first plane, planes): launches it on the current stream."""
    _, _, num_blocks, heads, block_tokens, dim = arena.shape
    words = dim * arena.element_size() // _WORD
    wide = 1 << (words - 1).bit_length()
    each = max(1, _PROGRAM_WORDS // wide)
    source = arena.view(-1).view(torch.int64)

    def copy(wire: Tensor, table: Tensor, first: int, planes: int) -> None:
        total = wire if checksum is None else checksum
        launch(
            copy_heads,
            (-(-heads * num_tokens // each), planes, 1),
            (source, wire, table, total, num_blocks, tok_from, num_tokens, first),
            num_warps=4,
            HEADS=heads,
            PAGE=block_tokens,
            WORDS=words,
            WIDE=wide,
            BLOCK=each,
            SCATTER=scatter,
            CHECKSUM=checksum is not None,
        )

    return copy
