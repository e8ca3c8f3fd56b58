"""Where one attempt's text meets the next one's, what is asked of the next one, and waits that are cut short."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journeys import asked_text, parse_chat, run

from diptych.cluster.gateway.continuation import Seam, Told, continued
from diptych.cluster.gateway.watch import Watch
from diptych.protos.deltas import Content, Reasoning
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Usage

WORDS = st.text("ab \n", min_size=1, max_size=8)


def told(*texts: str) -> Told:
    found = Told()
    for text in texts:
        found.add(Content(text))
    return found


def request(**fields: object) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], **fields}
    return parse_chat(json.dumps(body).encode())


@settings(max_examples=60, deadline=None)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=4))
def test_spaces_at_the_seam_are_told_once(before: str, pieces: list[str]) -> None:
    """What was not sent of the text, the next target says again: `two  three`, or `twothree`."""
    text = "x" + before
    whole = text + "".join(pieces)
    rest = whole[len(text.rstrip()) :]  # of the stripped text, the next target goes on with these
    cuts = sorted({len(piece) % (len(rest) + 1) for piece in pieces})
    parts = [rest[a:b] for a, b in zip([0, *cuts], [*cuts, len(rest)], strict=True)]
    seam = Seam(told(text))
    events = [seam.joined(Content(part)) for part in parts]
    assert text + "".join(event.text for event in events if isinstance(event, Content)) == whole


def test_other_words_at_the_seam_stay_as_they_are() -> None:
    """A target that begins without the space keeps its letters."""
    seam = Seam(told("one "))
    assert [seam.joined(event) for event in (Usage(), Content("two"), Content(" "), Reasoning("x"))] == [
        Usage(),
        Content("two"),
        Content(" "),
        Reasoning("x"),
    ]


@pytest.mark.parametrize(
    ("fields", "most"),
    [({}, None), ({"max_tokens": 100}, 96), ({"max_completion_tokens": 100}, 96), ({"max_tokens": 2}, 1)],
)
def test_a_continuation_asks_for_what_is_left(fields: dict[str, object], most: int | None) -> None:
    """Twice as many tokens as the client had asked for; or none, which providers refuse."""
    asked = continued(request(**fields), told("one", " two", " three "))
    assert asked_text(asked) == [("user", "q"), ("assistant", "one two three")]
    assert asked.template.continue_final
    assert asked.wanted_tokens == (None if most is None else (next(iter(fields)), most))


def test_a_request_that_was_a_continuation_stays_one() -> None:
    """Two assistant messages in a row, of which templates drop one."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so "}]
    asked = continued(request(messages=messages, continue_final_message=True), told("far"))
    assert asked_text(asked) == [("user", "q"), ("assistant", "so far")]


def test_a_client_who_leaves_at_the_moment_of_a_timeout_is_not_held() -> None:
    """The cancellation was taken for the watch's own, and the task went on for a client that was gone."""

    async def job() -> None:
        loop = asyncio.get_running_loop()
        ends = []

        async def wait() -> None:
            watch = Watch()
            watch.begin(1.0)
            try:
                await asyncio.sleep(9)
            except asyncio.CancelledError:
                ends.append(watch.end())
                watch.close()
                raise

        task = loop.create_task(wait())
        loop.call_at(1.0, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()
        assert ends == [False]

    run(job())


def test_a_watch_rings_at_the_latest_wait_alone() -> None:
    """One timer for all waits: a later wait must not be cut by an earlier one's end, nor a shorter one be missed."""

    async def job() -> None:
        watch, loop = Watch(), asyncio.get_running_loop()
        for seconds in (0.9, 0.9, 0.9):
            watch.begin(1.0)
            await asyncio.sleep(seconds)
            assert not watch.end()
        watch.close()
        watch = Watch()
        watch.begin(100.0)
        await asyncio.sleep(0)
        assert not watch.end()
        began = loop.time()
        watch.begin(0.5)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(9)
        assert watch.end()
        assert loop.time() - began == pytest.approx(0.5)
        watch.close()

    run(job())
