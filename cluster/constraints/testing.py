"""Answers that a grammar allows, made at random, for tests: what the check after an answer is asked about."""

from __future__ import annotations

import random

from diptych.cluster.constraints import trial


def walk(grammar: str, rng: random.Random, *, most: int = 1500) -> str | None:
    """An answer by the grammar, byte after byte; None where it did not end in time."""
    matcher = trial.matcher(grammar)
    assert not matcher.is_error(), matcher.get_error()
    made = bytearray()
    while len(made) < most:
        if matcher.is_accepting() and (matcher.is_stopped() or rng.random() < 0.3):
            return made.decode()
        mask = matcher.compute_bitmask()
        possible = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
        if not possible:
            return made.decode() if matcher.is_accepting() else None
        closing = [byte for byte in possible if byte in b'}]"']
        plain = [byte for byte in possible if 32 <= byte < 127]
        chosen = rng.choice(closing if closing and len(made) > 60 and rng.random() < 0.7 else plain or possible)
        assert matcher.consume_token(chosen)
        made.append(chosen)
    return None
