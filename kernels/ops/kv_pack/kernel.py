"""Gather and scatter of KV between blocks and the wire form: one copy of whole heads of tokens, in words of 8 bytes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mixed(word, index):
    """64 bits in which each bit of a word and of its place has a part (the finaliser of splitmix64)."""
    x = word.to(tl.uint64) ^ ((index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["num_blocks", "tok_from", "num_tokens", "first_plane"])
def copy_heads(
    arena, wire, blocks, total, num_blocks, tok_from, num_tokens,
    first_plane,  # layer * 2 + (0 for K, 1 for V); the wire begins with it
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,  # of one head of one token
    WIDE: tl.constexpr,  # WORDS or more, a power of 2
    BLOCK: tl.constexpr,  # heads of tokens in a program
    SCATTER: tl.constexpr,  # from the wire into blocks
    CHECKSUM: tl.constexpr,  # added to `total`
):  # fmt: skip
    """BLOCK heads of tokens of one plane."""
    plane = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, position = row // num_tokens, tok_from + row % num_tokens
    inside = row < HEADS * num_tokens
    block = tl.load(blocks + position // PAGE, mask=inside, other=0).to(tl.int64)
    word = tl.arange(0, WIDE)
    read = inside[:, None] & (word < WORDS)[None, :]
    at_arena = (((first_plane + plane) * num_blocks + block) * HEADS + head) * PAGE + position % PAGE
    at_wire = plane * (HEADS * num_tokens) + row
    arena_words = arena + at_arena[:, None] * WORDS + word[None, :]
    wire_words = wire + at_wire[:, None] * WORDS + word[None, :]
    if SCATTER:
        x = tl.load(wire_words, mask=read, other=0)
        tl.store(arena_words, x, mask=read)
    else:
        x = tl.load(arena_words, mask=read, other=0)
        tl.store(wire_words, x, mask=read)
    if CHECKSUM:
        index = (first_plane * (HEADS * num_tokens) + at_wire)[:, None] * WORDS + word[None, :]
        mixed = tl.where(read, _mixed(x, index).to(tl.int64), 0)
        tl.atomic_add(total, tl.sum(mixed))
