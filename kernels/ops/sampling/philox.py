"""Philox4x32-10 (Salmon et al., SC11) in plain integers: the definition of every random number that sampling uses.

A number depends on (seed, position) only, so a retried, migrated or rebatched request makes the same choices.
"""

from __future__ import annotations

_MASK = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_WEYL = (0x9E37_79B9, 0xBB67_AE85)
ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words of a 128-bit counter and a 64-bit key, each given as words, lowest first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A multiple of 2**-53 in [0, 1): counter = position, key = seed modulo 2**64, the first two words."""
    seed &= 0xFFFF_FFFF_FFFF_FFFF
    word0, word1, _, _ = philox4x32((position & _MASK, position >> 32, 0, 0), (seed & _MASK, seed >> 32))
    return float((word0 >> 5) * 2**26 + (word1 >> 6)) * 2.0**-53
