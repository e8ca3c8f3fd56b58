"""The echo model's KV in an arena's memory, as 64-bit words: written from states, read back and judged word by word.

The slot of position i in layer l, K or V, head h:   | s * 1 ^ C | s * M1 ^ C | s * M2 ^ C | ...   s: state after i
C differs for each (l, K or V, h) and is 0 for layer 0's first K, whose first word is therefore s itself; into the first
word of layer 0's first V goes the token id as well. So every byte of a slot follows from the prefix, and a slot that
was moved to another layer, head, side or position, or of which a bit changed, no longer fits its neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .hashing import ROOT, U64, mix, mix_array, share_array

Int = NDArray[np.int64]
_PIECE_BYTES = 1 << 19  # read at once: what stays in a core's cache


class EchoMemory:
    """`memory` is the arena's, bytes [layers, 2, num_blocks, kv_heads, block_tokens, head bytes], contiguous.

    Raises ValueError when a head's bytes are no multiple of 8.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        if memory.ndim != 6 or memory.shape[5] % 8 or not memory.flags.c_contiguous:
            raise ValueError(f"KV of shape {memory.shape} is not contiguous words of 8 bytes")
        self._words: U64 = memory.view(np.uint64)
        layers, sides, _, heads, self.block_tokens, self._width = self._words.shape
        count = layers * sides * heads
        marks = mix_array(np.arange(count, dtype=np.uint64))  # mix(0) is 0
        self._marks = marks.reshape(layers, sides, heads)
        factors = [1] + [mix(index) | 1 for index in range(1, self._width)]
        self._factors = np.array(factors, dtype=np.uint64)
        self._piece = max(1, _PIECE_BYTES // (count * self.block_tokens * self._width * 8))

    def state(self, blocks: Int, offsets: Int) -> U64:
        """The states that lie there, whatever else does."""
        found: U64 = self._words[0, 0, blocks, 0, offsets, 0]
        return found

    def write(self, blocks: Int, offsets: Int, states: U64, tokens: U64) -> None:
        """The slots of as many positions."""
        rows = states[:, None] * self._factors
        slots = rows[:, None, None, None, :] ^ self._marks[:, :, :, None]
        slots[:, 0, 1, 0, 0] ^= tokens
        self._words[:, :, blocks, :, offsets, :] = slots  # [position, layer, side, head, word]

    def read(self, blocks: Int) -> tuple[U64, U64, NDArray[np.bool_]]:
        """States, tokens and whether each slot's words fit its state: [blocks, block_tokens] each."""
        shape = len(blocks), self.block_tokens
        states, tokens = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
        fits = np.empty(shape, np.bool_)
        for at in range(0, len(blocks), self._piece):
            part = slice(at, at + self._piece)
            states[part], tokens[part], fits[part] = self._read_piece(blocks[part])
        return states, tokens, fits

    def _read_piece(self, blocks: Int) -> tuple[Any, Any, Any]:
        words = self._words.take(blocks, axis=2)
        count, size, width = len(blocks), self.block_tokens, self._width
        states = words[0, 0, :, 0, :, 0].copy()
        wanted = (states[:, :, None] * self._factors).reshape(count, 1, size * width)
        flat = words.reshape(*self._marks.shape[:2], count, self._marks.shape[2], size * width)
        flat ^= wanted
        flat ^= self._marks[:, :, None, :, None]
        tokens = words[0, 1, :, 0, :, 0].copy()
        words[0, 1, :, 0, :, 0] = 0  # the token itself is judged by who knows the state before
        # Long runs first, and no run of a few words: one reduction over all axes takes twice as long.
        wrong = np.bitwise_or.reduce(words.reshape(-1, count * words.shape[3] * size * width), axis=0)
        wrong = np.bitwise_or.reduce(wrong.reshape(count, -1, size * width), axis=1)
        wrong = np.bitwise_or.reduce(wrong.reshape(count * size, width).T.copy(), axis=0)
        return states, tokens, wrong.reshape(count, size) == 0


def chain(states: U64, tokens: U64, positions: U64, first: Int) -> NDArray[np.bool_]:
    """Whether each state follows from the one before it and its token; flat, sequences one after another.

    `first`: index of each sequence's position 0.
    """
    before = np.empty_like(states)
    before[1:] = states[:-1]
    before[first] = ROOT
    follows: NDArray[np.bool_] = states - before == share_array(tokens, positions)
    return follows
