"""The parser of text/event-stream: any cut of the same bytes gives the same events.

Guards against an end of line that is read as two when a piece ends within it, an event lost behind a comment, an event
that the connection cut off and that is told all the same, and a provider that fills the memory with one event.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.providers.codec import ServerEvent
from diptych.protos.providers.event_stream import MAX_EVENT_BYTES, EventStream

DATA = st.sampled_from(["data: a", "data:b", "data:  c", "data", "data:", "data: \u00e9\u2028"])
OTHERS = st.sampled_from(["event: e", "event:", "id: 4", "retry: 1", "x: y", ": a comment", ": ", "dataset: z"])
LINES = DATA | OTHERS | st.just("")
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def by_the_book(text: str) -> list[ServerEvent]:
    """The rules as they are written, over the whole text."""
    found: list[ServerEvent] = []
    data: list[str] = []
    event = ""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for line in lines[:-1]:
        if not line:
            found += [ServerEvent("\n".join(data), event)] if data else []
            data, event = [], ""
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "event":
            event = value
    return found


@settings(max_examples=150)
@given(st.lists(st.tuples(LINES, ENDS), max_size=14), st.booleans(), st.lists(st.integers(0, 200), max_size=8))
def test_any_cut_of_the_bytes_gives_the_events(lines: list[tuple[str, str]], has_bom: bool, cuts: list[int]) -> None:
    text = ("\ufeff" if has_bom else "") + "".join(line + end for line, end in lines)
    body = text.encode()
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    stream = EventStream()
    found = [event for a, b in pairwise(places) for event in stream.feed(body[a:b])]
    assert found == by_the_book(text)


def test_a_byte_at_a_time_is_a_cut_like_any_other() -> None:
    body = b"\xef\xbb\xbfdata: one\r\ndata: two\r\n\r\nevent: end\r\ndata: [DONE]\r\r: bye\n\ndata: never told\n"
    stream = EventStream()
    found = [event for i in range(len(body)) for event in stream.feed(body[i : i + 1])]
    assert found == [ServerEvent("one\ntwo"), ServerEvent("[DONE]", "end")]


def test_an_event_is_told_with_the_byte_that_ends_it() -> None:
    """A parser that waits for what may follow a carriage return is one event late, for good at the end."""
    stream = EventStream()
    assert stream.feed(b"data: x\r\r") == [ServerEvent("x")]
    assert stream.feed(b"\ndata: y\n\n") == [ServerEvent("y")]


def test_letters_that_are_none_do_not_stop_the_stream() -> None:
    stream = EventStream()
    assert stream.feed(b"data: \xff\n\ndata: ok\n\n") == [ServerEvent("\ufffd"), ServerEvent("ok")]


@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n", b"event: " + b"x" * 65536], ids=str)
def test_an_event_without_an_end_is_a_failure(piece: bytes) -> None:
    stream = EventStream()
    for _ in range(MAX_EVENT_BYTES // 65536 - 1):
        assert stream.feed(piece) == []
    with pytest.raises(ProviderFailure) as caught:
        stream.feed(piece * 2)
    assert caught.value.failure.kind is FailureKind.SERVER
    assert "4 MiB" in caught.value.failure.message
