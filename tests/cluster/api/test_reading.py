"""An answer's text read as reasoning, content, calls and finished JSON parts.

Guards against deltas that depend on where the network cut the text, or do not add up to the message.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.api.answer import Choice, Piece
from diptych.cluster.api.reading import AnswerReader, Reading, Said
from diptych.cluster.api.said import deltas_of, message_of
from diptych.cluster.formats.calls import write_calls
from diptych.cluster.formats.format import HERMES, JSON, REASONING_FORMATS, TOOL_FORMATS, Format

THINK = REASONING_FORMATS["think"]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


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


def all_said(reader: AnswerReader, pieces: list[str]) -> list[list[Said]]:
    return [*[reader.feed(piece) for piece in pieces], reader.finish()]


def read(reading: Reading, pieces: list[str]) -> tuple[dict[str, Any], AnswerReader]:
    reader = AnswerReader(reading)
    return joined([delta for said in all_said(reader, pieces) for delta in deltas_of(said, is_legacy=False)]), reader


def message(reading: Reading, pieces: list[str]) -> dict[str, Any]:
    said = [one for some in all_said(AnswerReader(reading), pieces) for one in some]
    return message_of(said, is_legacy=reading.is_legacy)


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
    found = message(reading, [text])
    assert found["refusal"] is None
    assert whole["content"] == (found["content"] or "") == reader.content
    assert whole["reasoning_content"] == found.get("reasoning_content", "")
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in found.get("tool_calls", ())]
    assert [tuple(call) for call in whole["calls"]] == calls == [(call.name, call.arguments) for call in reader.calls]
    if calls:
        assert found["content"] is None or found["content"]
        assert reader.finish_reason("stop") == "tool_calls"
        assert reader.finish_reason("length") == "length"


def test_a_named_and_a_legacy_call() -> None:
    text = write_calls(HERMES, CALLS[:1])
    named = Reading(format=Format(HERMES), tool_names=("weather",), is_named=True)
    assert read(named, [text])[1].finish_reason("stop") == "stop"
    old = Reading(format=Format(HERMES), tool_names=("weather",), is_legacy=True)
    legacy = AnswerReader(old)
    first, *rest = deltas_of([*legacy.feed(text), *legacy.finish()], is_legacy=True)
    assert first == {"function_call": {"name": "weather", "arguments": ""}}
    assert "".join(part["function_call"]["arguments"] for part in rest) == CALLS[0][1]
    assert message(old, [text])["function_call"] == {"name": "weather", "arguments": CALLS[0][1]}
    assert legacy.finish_reason("stop") == "function_call"


def test_reasoning_that_is_not_wanted_is_left_out() -> None:
    reading = Reading(format=Format(JSON, THINK), in_reasoning=True, shows_reasoning=False)
    pieces = list("hm, 1 < 2\n</think>\n\n42")
    found, _ = read(reading, pieces)
    assert found == {"content": "42", "reasoning_content": "", "calls": [], "structured": []}
    assert message(reading, pieces) == {"role": "assistant", "content": "42", "refusal": None}


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
    for number, piece in enumerate(pieces, 1):
        choice.read(Piece(piece, (), number))
    assert choice.reasoning_tokens == count
