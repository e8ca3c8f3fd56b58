"""kv_pack and kv_unpack for CPU tensors: one strided copy per block, straight to its place. Shapes: reference.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def _runs(block_tokens: int, tok_from: int, num_tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """(index of the block, first offset in it, place in the range, length) of every run of tokens within one block."""
    at = 0
    while at < num_tokens:
        index, offset = divmod(tok_from + at, block_tokens)
        length = min(block_tokens - offset, num_tokens - at)
        yield index, offset, at, length
        at += length


def pack(arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, out_L2HND: Tensor) -> None:
    """As reference.pack."""
    for index, offset, at, length in _runs(arena_L2BHTD.shape[4], tok_from, out_L2HND.shape[3]):
        source = arena_L2BHTD[:, :, blocks[index], :, offset : offset + length]
        out_L2HND[:, :, :, at : at + length].copy_(source)


def unpack(arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, data_L2HND: Tensor) -> None:
    """As reference.unpack."""
    for index, offset, at, length in _runs(arena_L2BHTD.shape[4], tok_from, data_L2HND.shape[3]):
        target = arena_L2BHTD[:, :, blocks[index], :, offset : offset + length]
        target.copy_(data_L2HND[:, :, :, at : at + length])
