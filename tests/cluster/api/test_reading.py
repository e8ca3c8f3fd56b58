"""An answer's text read as reasoning, content, calls and finished JSON parts.

Guards against events that depend on where the network cut the text, pointers that lead elsewhere, and a number that no
JSON can tell.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diptych.cluster.api.answer import Choice, Piece
from diptych.cluster.api.closed_paths import ClosedPaths
from diptych.cluster.api.reading import AnswerReader, Reading
from diptych.cluster.formats.calls import write_calls
from diptych.cluster.formats.format import HERMES, JSON, REASONING_FORMATS, TOOL_FORMATS, Format

THINK = REASONING_FORMATS["think"]
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


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream's deltas put together as clients do; ids apart."""
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": [], "structured": []}
    for delta in deltas:
        assert delta
        found["content"] += delta.get("content", "")
        found["reasoning_content"] += delta.get("reasoning_content", "")
        found["structured"] += delta.get("structured", [])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(found["calls"])
                assert call["type"] == "function"
                found["calls"].append(["", ""])
            found["calls"][call["index"]][0] += call["function"].get("name", "")
            found["calls"][call["index"]][1] += call["function"]["arguments"]
    return found


def read(reading: Reading, pieces: list[str]) -> tuple[dict[str, Any], AnswerReader]:
    reader = AnswerReader(reading)
    deltas = [delta for piece in pieces for delta in reader.feed(piece)]
    return joined([*deltas, *reader.finish()]), reader


CALLS = [("weather", '{"city": "Z\u00fcrich", "days": [1, "]}"]}'), ("clock", "{}")]
TEXTS = ["hello", "<think>\nhm {\n</think>\n\nok", '{"a~/b": [1, "\U0001f600"]}', "[", ""]


@given(
    st.sampled_from([*TOOL_FORMATS.values()]),
    st.sampled_from([*TEXTS, "calls", "thought and calls", "text and calls"]),
    st.lists(st.integers(0, 10**6), max_size=6),
)
def test_deltas_add_up_to_the_message(format: Any, text: str, places: list[int]) -> None:
    if text.endswith("calls"):
        lead = {"calls": "", "thought and calls": "<think>hm</think>", "text and calls": "Sure. "}[text]
        text = lead + write_calls(format, CALLS, in_text=bool(lead) and "<" not in lead)
    reading = Reading(format=Format(format, THINK), tool_names=("weather", "clock"), tells_parts=True)
    whole, reader = read(reading, [text])
    assert read(reading, cut(text, places))[0] == whole
    assert read(reading, list(text))[0] == whole
    message = reader.message()
    assert message["refusal"] is None
    assert whole["content"] == (message["content"] or "") == reader.content
    assert whole["reasoning_content"] == message.get("reasoning_content", "")
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert [tuple(call) for call in whole["calls"]] == calls == reader.calls
    if calls:
        assert message["content"] is None or message["content"]
        assert reader.finish_reason("stop") == "tool_calls"
        assert reader.finish_reason("length") == "length"


def test_a_named_and_a_legacy_call() -> None:
    text = write_calls(HERMES, CALLS[:1])
    named = Reading(format=Format(HERMES), tool_names=("weather",), is_named=True)
    assert read(named, [text])[1].finish_reason("stop") == "stop"
    legacy = AnswerReader(Reading(format=Format(HERMES), tool_names=("weather",), is_legacy=True))
    first, *rest = [*legacy.feed(text), *legacy.finish()]
    assert first == {"function_call": {"name": "weather", "arguments": ""}}
    assert "".join(part["function_call"]["arguments"] for part in rest) == CALLS[0][1]
    assert legacy.message()["function_call"] == {"name": "weather", "arguments": CALLS[0][1]}
    assert legacy.finish_reason("stop") == "function_call"


def test_reasoning_that_is_not_wanted_is_left_out() -> None:
    reading = Reading(format=Format(JSON, THINK), in_reasoning=True, shows_reasoning=False)
    found, reader = read(reading, list("hm, 1 < 2\n</think>\n\n42"))
    assert found == {"content": "42", "reasoning_content": "", "calls": [], "structured": []}
    assert reader.message() == {"role": "assistant", "content": "42", "refusal": None}


def test_parts_of_a_text_that_the_prompt_began() -> None:
    reading = Reading(format=Format(), tells_parts=True, prefix='{"a": 1, "b": "x')
    assert read(reading, ['y"}'])[0]["structured"] == [{"path": "/b", "value": "xy"}, {"path": "", "closed": "object"}]


@pytest.mark.parametrize(
    ("in_reasoning", "pieces", "count"),
    [
        (False, ["<think>", "a", "b", "</think>", "ok"], 3),
        (True, ["a", "b", "</think>", "ok"], 2),
        (True, ["a", "b"], 2),  # cut amid it
        (False, ["ok", "then"], 0),
    ],
)
def test_tokens_of_the_reasoning_are_counted(in_reasoning: bool, pieces: list[str], count: int) -> None:
    """OpenAI's completion_tokens_details; here each piece is one token."""
    reader = AnswerReader(Reading(format=Format(None, THINK), in_reasoning=in_reasoning))
    choice = Choice(index=0, call=cast("Any", None), text=cast("Any", None), reader=reader)
    for piece in pieces:
        choice.num_tokens += 1
        choice.read(Piece(piece))
    assert choice.reasoning_tokens == count
