"""The op's Triton kernels; letters as in reference.py. Rows are taken in vectors, a prompt's tokens in pieces."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply(wire, words, COUNT_AT: tl.constexpr, WHERE_AT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (pieces of the updates)."""
    count = tl.load(wire + COUNT_AT)
    where = tl.load(wire + WHERE_AT)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(wire + where + i, mask=i < count, other=0)
    value = tl.load(wire + where + count + i, mask=i < count, other=0)
    tl.store(words + word, value, mask=i < count)


@triton.jit(do_not_specialize=["num_rows", "token_stride", "block_stride"])
def build_rows(
    wire,
    tokens,
    blocks,
    ids,
    positions,
    slot_mapping,
    row_of,
    query_start,
    seq_len,
    slots,
    flags,
    num_rows,
    token_stride,
    block_stride,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    MISSING: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (pieces of the rows)."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = r < num_rows
    at = wire + HEADER + ROW * r
    slot = tl.load(at, mask=here, other=0).to(tl.int64)
    start = tl.load(at + 1, mask=here, other=0)
    num = tl.load(at + 2, mask=here, other=0)
    first = tl.load(at + 3, mask=here, other=0)
    tl.store(slots + r, slot.to(tl.int32), mask=here)
    tl.store(seq_len + r, start + num, mask=here)
    tl.store(query_start + r, first, mask=here)
    tl.store(query_start + r + 1, first + num, mask=r == num_rows - 1)
    # The token of a row of one; a prompt's tokens are another kernel's.
    single = here & (num == 1)
    token = tl.load(tokens + slot * token_stride + start, mask=single, other=0)
    block = tl.load(blocks + slot * block_stride + start // PAGE, mask=single, other=0).to(tl.int64)
    tl.store(ids + first, tl.maximum(token, 0), mask=single)
    tl.store(positions + first, start, mask=single)
    tl.store(slot_mapping + first, block * PAGE + start % PAGE, mask=single)
    tl.store(row_of + first, r, mask=single)
    tl.store(flags + r, tl.where(token < 0, MISSING, 0), mask=here)


@triton.jit(do_not_specialize=["first_row", "token_stride", "block_stride"])
def build_prompts(
    wire,
    tokens,
    blocks,
    ids,
    positions,
    slot_mapping,
    row_of,
    first_row,
    token_stride,
    block_stride,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows of prompts, pieces of the longest). `first_row` is the first of these rows."""
    r = first_row + tl.program_id(0)
    at = wire + HEADER + ROW * r
    num = tl.load(at + 2)
    if tl.program_id(1) * BLOCK < num:
        slot = tl.load(at).to(tl.int64)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = i < num
        position = tl.load(at + 1) + i
        t = tl.load(at + 3) + i
        token = tl.load(tokens + slot * token_stride + position, mask=here, other=0)
        block = tl.load(blocks + slot * block_stride + position // PAGE, mask=here, other=0).to(tl.int64)
        tl.store(ids + t, tl.maximum(token, 0), mask=here)
        tl.store(positions + t, position, mask=here)
        tl.store(slot_mapping + t, block * PAGE + position % PAGE, mask=here)
        tl.store(row_of + t, tl.zeros([BLOCK], tl.int32) + r, mask=here)


@triton.jit(do_not_specialize=["num_rows", "token_stride"])
def publish(
    wire,
    tokens,
    row_flags,
    chosen,
    chosen_flags,
    out,
    num_rows,
    token_stride,
    HEADER: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (pieces of the rows)."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = r < num_rows
    at = wire + HEADER + ROW * r
    slot = tl.load(at, mask=here, other=0).to(tl.int64)
    after = tl.load(at + 1, mask=here, other=0) + tl.load(at + 2, mask=here, other=0)
    place = tl.load(at + 4, mask=here, other=-1)
    samples = place >= 0
    found = tl.load(row_flags + r, mask=here, other=0)
    found = found | tl.load(chosen_flags + place, mask=samples, other=0)
    token = tl.load(chosen + place, mask=samples, other=0).to(tl.int32)
    token = tl.where(samples & (found == 0), token, -1)
    tl.store(tokens + slot * token_stride + after, token, mask=here)
    tl.store(out + 2 * r, token, mask=here)
    tl.store(out + 2 * r + 1, found, mask=here)
