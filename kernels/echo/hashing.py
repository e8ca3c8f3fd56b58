"""The echo model's arithmetic, modulo 2**64: for plain integers (the definition) and for numpy arrays.

state after position i = ROOT + share(token 0, 0) + ... + share(token i, i)
KV of position i       = words made of that state, and the token id in one of them; see memory.py
most likely next token = favourite(state): a word
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diptych.protos.echo import NUM_WORDS

U64 = NDArray[np.uint64]

MASK = 2**64 - 1
ROOT = 0x6A09_E667_F3BC_C909  # the state before position 0
POISON = 0xA5A5_5A5A_C3C3_3C3D  # added to the state of a sequence that read wrong KV: no later check can hold
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_FAVOURITE = 0x510E_527F_ADE6_82D1
_SHIFTS = (30, 27, 31)
_FACTORS = (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)


def mix(number: int) -> int:
    """A permutation of the numbers below 2**64 without visible order (the finish of splitmix64)."""
    number = (number ^ number >> _SHIFTS[0]) * _FACTORS[0] & MASK
    number = (number ^ number >> _SHIFTS[1]) * _FACTORS[1] & MASK
    return number ^ number >> _SHIFTS[2]


def share(token: int, position: int) -> int:
    """What a token adds to the state: no two pairs of numbers below 2**32 add the same."""
    return mix((position << 32 ^ token) + _GOLDEN & MASK)


def favourite(state: int) -> int:
    """The most likely token after a state."""
    return mix(state ^ _FAVOURITE) % NUM_WORDS


def mix_array(numbers: U64) -> U64:
    """`mix` of each."""
    numbers = (numbers ^ numbers >> np.uint64(_SHIFTS[0])) * np.uint64(_FACTORS[0])
    numbers = (numbers ^ numbers >> np.uint64(_SHIFTS[1])) * np.uint64(_FACTORS[1])
    return numbers ^ numbers >> np.uint64(_SHIFTS[2])


def share_array(tokens: U64, positions: U64) -> U64:
    """`share` of each pair; also defined, and different, for tokens that are no ids."""
    return mix_array((positions << np.uint64(32) ^ tokens) + np.uint64(_GOLDEN))


def favourite_array(states: U64) -> U64:
    """`favourite` of each."""
    return mix_array(states ^ np.uint64(_FAVOURITE)) % np.uint64(NUM_WORDS)
