"""JSON that comes in pieces: which of its parts are complete, and what is none.

Guards against events that depend on where the network cut the text, pointers that lead elsewhere, a number that no JSON
can tell, and work that grows faster than the text.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diptych.protos.closed_paths import ClosedPaths
from diptych.protos.json_scanner import JsonScanner

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
KEYS = st.one_of(
    st.text(max_size=4), st.sampled_from(["", "/", "~", "~1", "~0/", "0", "\u00e9", "\U0001f600", '"', "\\"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


def events_by(value: Any, path: str = "") -> list[dict[str, Any]]:
    """What is told of a value, found from the value."""
    if not isinstance(value, dict | list) or not value:
        return [{"path": path, "value": value}]
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    told = []
    for name, part in parts:
        told += events_by(part, f"{path}/{str(name).replace('~', '~0').replace('/', '~1')}")
    return [*told, {"path": path, "closed": "object" if isinstance(value, dict) else "array"}]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def told_of(pieces: list[str]) -> list[dict[str, Any]]:
    paths = ClosedPaths()
    return [*(event for piece in pieces for event in paths.feed(piece)), *paths.finish()]


def same(found: list[Any], wanted: list[Any]) -> bool:
    """1 is not 1.0 and not true here."""
    return json.dumps(found) == json.dumps(wanted)


@given(VALUES, st.booleans(), st.sampled_from([None, 0, 1]), st.lists(st.integers(0, 10**6), max_size=5))
@example({"a/b": {"~": [1, {"": "x"}]}, "m~n": []}, True, None, [3])
@example([{}, None, [], "x"], True, None, [4])
@example(-1.5e-7, True, None, [2])
@example({"a": -0.0, "b": 10**30, "c": "\ud83d"}, True, None, [1, 9])
def test_every_finished_part_is_told_once_however_the_text_is_cut(
    value: Any, ascii_only: bool, indent: int | None, places: list[int]
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    wanted = events_by(value)
    assert same(told_of([text]), wanted)
    assert same(told_of(cut(text, places)), wanted)
    assert same(told_of(list(text)), wanted)


@given(VALUES, st.integers(0, 10**6))
def test_of_a_cut_text_the_finished_parts_are_told(value: Any, place: int) -> None:
    """A number at the top is taken for finished where the text ends: only there."""
    text = json.dumps(value)
    begun = told_of([text[: place % len(text)]])
    if isinstance(value, dict | list):
        assert same(begun, events_by(value)[: len(begun)])


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity"])
def test_what_json_cannot_tell_is_not_told(text: str) -> None:
    """The event would have been no JSON, and the whole stream unreadable."""
    assert told_of([text]) == []
    assert told_of([f'{{"a":1,"b":{text},"c":2}}']) == [{"path": "/a", "value": 1}]


@pytest.mark.parametrize(
    "text", ["", "}", "]", ",", "{]", "hello", '{"a" 1}', '{"a":tru}', "[1,,2]", '{"a":1}}', "[1 2"]
)
def test_what_is_no_json_never_raises(text: str) -> None:
    for event in told_of(list(text)):
        json.dumps(event, allow_nan=False)


class Deaf:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.told = 0

    def opens(self, kind: str) -> None:
        self.told += 1

    def key(self, name: str) -> None:
        self.told += 1

    def value(self, value: Any) -> None:
        self.told += 1

    def closes(self, *, is_empty: bool) -> None:
        self.told += 1


def finite(text: str) -> float:
    """Numbers beyond any float are none that could be told again."""
    if math.isinf(number := float(text)):
        raise ValueError(text)
    return number


@given(VALUES, st.lists(st.integers(0, 10**6), max_size=3), st.text(alphabet='[]{}",:x1 ', max_size=4))
def test_the_scanner_takes_what_a_parser_takes_and_nothing_else(value: Any, places: list[int], odd: str) -> None:
    text = json.dumps(value)
    for place in places[:1]:
        text = text[: place % (len(text) + 1)] + odd + text[place % (len(text) + 1) :]
    is_json = True
    try:
        json.loads(text, parse_constant=lambda _: 1 / 0, parse_float=finite)
    except (ValueError, ZeroDivisionError):
        is_json = False
    scanner = JsonScanner(Deaf())
    try:
        for piece in cut(text, places):
            at = scanner.feed(piece)
            if at < len(piece) and piece[at:].strip():
                raise ValueError("more behind it")
            assert at == len(piece) or scanner.is_over
        scanner.finish()
        was_taken = scanner.is_over
    except ValueError:
        was_taken = False
    if is_json:
        assert was_taken
    elif was_taken:  # what follows the value in pieces of its own is not looked at
        json.JSONDecoder().raw_decode(text.lstrip())


@pytest.mark.parametrize(
    "text", ["[1 2]", '{"a" 1}', '{"a":1,}', "[1,]", "[}", "{]", '{"a":}', "{1:2}", '["a" "b"]', "]", "[tru]"]
)
def test_what_only_looks_like_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  any
        JsonScanner(Deaf()).feed(text)


def test_depth_costs_nothing() -> None:
    sink = Deaf()
    JsonScanner(sink).feed("[" * 100_000 + "]" * 100_000)
    assert sink.told == 200_000
