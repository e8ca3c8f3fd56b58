"""The size of plain JSON, known before it is written."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from diptych.protos import wire_checks
from diptych.protos.wire_checks import compact, compact_in_pieces, may_fit


def any_value(rng: random.Random, depth: int = 4) -> Any:
    kind = rng.randrange(7 if depth else 5)
    if kind < 2:
        return 'ab\u00f6"\n'[: rng.randrange(6)]
    if kind < 5:
        return (None, True, False, 0, -1.5)[rng.randrange(5)]
    many = range(rng.randrange(5))
    if kind == 5:
        return [any_value(rng, depth - 1) for _ in many]
    return {str(i): any_value(rng, depth - 1) for i in many}


def test_what_fits_is_never_refused_and_what_is_far_too_long_always() -> None:
    rng = random.Random(6)
    for _ in range(3000):
        value = any_value(rng)
        size = len(compact(value).encode())
        assert may_fit(value, size), value
        assert not may_fit(value, size // 4 - 2), value


def test_a_long_list_is_looked_at_no_further_than_it_takes() -> None:
    class Watched(str):
        looks = 0

        def __len__(self) -> int:
            Watched.looks += 1
            return super().__len__()

    assert not may_fit({"enum": [Watched(f"v{i}") for i in range(100_000)]}, 65_536)
    assert Watched.looks < 65_536 / 4


def test_json_in_pieces_is_the_same_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a large answer that is another answer than a small one."""
    rng = random.Random(7)
    for most in (0, 8, 64, 4096):
        monkeypatch.setattr(wire_checks, "PIECE_BYTES", most)
        for _ in range(500):
            value = any_value(rng)
            assert compact_in_pieces(value) == compact(value)


def test_no_piece_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a list of 8,000 tokens, 20 alternatives with each, that is written in one go: it held the
    interpreter from everybody's streams for a third of a second.
    """
    sizes = []

    def watched(value: object) -> str:
        sizes.append(len(compact(value)))
        return compact(value)

    monkeypatch.setattr(wire_checks, "compact", watched)
    entry = {"token": "abc", "bytes": [97, 98, 99], "logprob": -1.25}
    answer = {"choices": [{"logprobs": {"content": [{**entry, "top_logprobs": [entry] * 20}] * 200}}]}
    assert json.loads(compact_in_pieces(answer)) == answer
    assert max(sizes) < 2 * wire_checks.PIECE_BYTES
