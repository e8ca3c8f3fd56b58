"""Checks shapes, then picks the implementation for the device. A wrong range is a programmer's error: ValueError."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import cpu, reference


def kv_pack(
    arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, out_L2HND: Tensor, checksum: Tensor | None = None
) -> None:
    """Gather positions tok_from .. tok_from + N - 1 of the sequence that lies in `blocks` into `out_L2HND`.

    `checksum` (int64 [1], on the arena's device) takes the sum of what it holds and reference.checksum of the wire.
    """
    _check(arena_L2BHTD, blocks, tok_from, out_L2HND)
    if arena_L2BHTD.is_cuda:
        from . import cuda

        if cuda.takes(arena_L2BHTD):
            cuda.pack(arena_L2BHTD, blocks, tok_from, out_L2HND, checksum)
            return
    chosen = cpu if arena_L2BHTD.device.type == "cpu" else reference
    chosen.pack(arena_L2BHTD, blocks, tok_from, out_L2HND)
    _add(checksum, out_L2HND)


def kv_unpack(
    arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, data_L2HND: Tensor, checksum: Tensor | None = None
) -> None:
    """Scatter `data_L2HND` to positions tok_from .. tok_from + N - 1 of the sequence that lies in `blocks`.

    `checksum` as above.
    """
    _check(arena_L2BHTD, blocks, tok_from, data_L2HND)
    if arena_L2BHTD.is_cuda:
        from . import cuda

        if cuda.takes(arena_L2BHTD):
            cuda.unpack(arena_L2BHTD, blocks, tok_from, data_L2HND, checksum)
            return
    chosen = cpu if arena_L2BHTD.device.type == "cpu" else reference
    chosen.unpack(arena_L2BHTD, blocks, tok_from, data_L2HND)
    _add(checksum, data_L2HND)


def _add(checksum: Tensor | None, wire_L2HND: Tensor) -> None:
    if checksum is not None:
        checksum += reference.checksum(wire_L2HND)


def _check(arena_L2BHTD: Tensor, blocks: Sequence[int], tok_from: int, wire_L2HND: Tensor) -> None:
    layers, two, num_blocks, heads, block_tokens, head_dim = arena_L2BHTD.shape
    num_tokens = wire_L2HND.shape[3]
    expected = (layers, two, heads, num_tokens, head_dim)
    if tuple(wire_L2HND.shape) != expected or wire_L2HND.dtype != arena_L2BHTD.dtype:
        raise ValueError(
            f"wire tensor {tuple(wire_L2HND.shape)} {wire_L2HND.dtype}, arena wants {expected} {arena_L2BHTD.dtype}"
        )
    if tok_from < 0 or tok_from + num_tokens > len(blocks) * block_tokens:
        raise ValueError(f"tokens {tok_from}..{tok_from + num_tokens} do not lie in {len(blocks)} x {block_tokens}")
    used = blocks[tok_from // block_tokens : -(-(tok_from + num_tokens) // block_tokens)]
    if used and not (min(used) >= 0 and max(used) < num_blocks):
        raise ValueError(f"block ids {list(used)} do not lie in an arena of {num_blocks} blocks")
