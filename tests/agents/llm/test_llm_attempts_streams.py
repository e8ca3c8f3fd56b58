"""Streams over several attempts: what a reader is told of failures, the reply at the end, backpressure.

Guards against: failures that nobody saw and everybody is told of, answers of two attempts in one text, an error that
comes a second time as "left before its end", and readers that are slower than the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from pydantic import BaseModel, Field

from diptych.agents import llm
from diptych.agents.llm.call import Call
from diptych.agents.llm.profiles import POOL, Profile
from diptych.agents.llm.streams import _MOST_WAITING, Source
from diptych.agents.llm.testing import Said, ScriptedModel, cut, failure, registry_of
from diptych.protos.deltas import Content
from diptych.protos.failures import ProviderFailure
from diptych.protos.replies import Began, Ended, Event

PLAIN = Profile(media=POOL.media)


class Small(BaseModel):
    n: int = Field(lt=5)


def asking(
    entries: list[Any], *others: list[Any], output: Any = None, **retries: Any
) -> tuple[Call[..., Any, Any], list[ScriptedModel]]:
    models = [ScriptedModel(one, profile=PLAIN) for one in (entries, *others)]
    registry = registry_of(**dict(zip("abcd", models, strict=False)))

    @llm.call("a/m", output=output, registry=registry, retries=llm.Retries(base_s=0, **retries))
    def ask() -> str:
        return "go"

    return ask, models


def told(events: list[Any]) -> list[Any]:
    """Texts joined; of the others their kinds, of restarts why."""
    found: list[Any] = []
    for event in events:
        if isinstance(event, Content) and found and isinstance(found[-1], str):
            found[-1] += event.text
        elif isinstance(event, Content):
            found.append(event.text)
        elif isinstance(event, llm.Restarted):
            found.append((event.number, event.why, type(event.error).__name__))
        else:
            found.append(type(event))
    return found


WHOLE = [Began, "hello", llm.Finished]


def without_ends(found: list[Any]) -> list[Any]:
    return [one for one in found if one is not Ended and getattr(one, "__name__", "") != "Usage"]


def test_a_failure_before_the_first_content_is_not_told() -> None:
    script = [failure("overloaded"), cut("x", after=1), "hello"]
    ask, (model,) = asking(script)
    stream = ask.stream()
    assert without_ends(told(list(stream))) == WHOLE
    assert [one.why for one in stream.reply().attempts] == ["first", "retry", "retry"]
    assert model.open_streams == 0
    assert stream.reply().attempts[1].text == ""


def test_neither_is_a_fallback() -> None:
    ask, _ = asking([failure("auth")], ["hello"], fallback=["b/m"])
    stream = ask.stream()
    assert without_ends(told(list(stream))) == WHOLE
    assert stream.reply().model == "b/m"


def test_what_was_told_is_taken_back() -> None:
    ask, (model,) = asking([cut("good morning", after=3), "hello"])
    stream = ask.stream()
    assert without_ends(told(list(stream))) == [Began, "good mor", (2, "retry", "ProviderError"), *WHOLE]
    first = stream.reply().attempts[0]
    assert first.text == "good mor"
    assert first.spent.requests == 1
    assert model.requests[0] == model.requests[1]


def test_an_invalid_answer_is_taken_back() -> None:
    ask, _ = asking([{"n": 9}, {"n": 1}], output=Small)
    stream = ask.stream()
    assert without_ends(told(list(stream)))[2] == (2, "reask", "InvalidOutput")
    assert stream.reply().value == Small(n=1)


def test_texts_alone_never_join_to_what_nobody_said() -> None:
    """Who reads texts alone does not see that an answer began anew: "good mor" and "hello" would be "good morhello"."""
    ask, _ = asking([cut("good morning", after=3), "hello"])
    pieces = list[str]()
    with pytest.raises(llm.ProviderError) as caught:
        pieces.extend(ask.stream().text())
    assert [attempt.text for attempt in caught.value.attempts] == ["good mor"]
    again, _ = asking([cut("good morning", after=3), "good morning"])
    assert "".join(again.stream().text()) == "good morning"
    shorter, _ = asking([cut("good morning", after=3), "good"])
    with pytest.raises(llm.ProviderError):
        list(shorter.stream().text())


async def test_thoughts_alone_neither() -> None:
    said = Said(text="x", thoughts="let me see")
    ask, _ = asking([cut(said, after=3), said])
    assert [piece async for piece in ask.stream().thoughts()] == ["let me see"]


async def test_the_same_both_ways() -> None:
    def script() -> list[Any]:
        return [cut("good morning", after=3), cut("x", after=1), "hello"]

    ask, (sync_model,) = asking(script())
    again, (async_model,) = asking(script())
    plain = await asyncio.to_thread(lambda: told(list(ask.stream())))
    stream = again.stream()
    assert told([event async for event in stream]) == plain
    assert sync_model.requests == async_model.requests
    assert (await stream.reply.aio()).value == "hello"


def test_the_reply_comes_with_or_without_reading() -> None:
    ask, _ = asking(["hello"] * 3)
    assert ask.stream().reply().value == "hello"
    stream = ask.stream()
    events = iter(stream)
    next(events)
    assert stream.reply().value == "hello"
    assert stream.reply() is stream.reply()
    for _ in (stream := ask.stream()):
        break
    with pytest.raises(llm.UsageError, match="left before its end"):
        stream.reply()
    with pytest.raises(llm.UsageError, match="read already"):
        next(iter(stream))


def test_a_failure_is_told_again() -> None:
    """It was told as a stream that nobody read to its end."""
    ask, _ = asking([failure("auth")])
    stream = ask.stream()
    with pytest.raises(llm.ProviderError) as first:
        list(stream)
    with pytest.raises(llm.ProviderError) as second:
        stream.reply()
    assert second.value is first.value
    assert len(first.value.attempts) == 1


def test_a_refused_attempt_has_no_answer() -> None:
    ask, _ = asking([failure("auth")])
    with pytest.raises(llm.ProviderError) as caught:
        ask.stream().reply()
    assert caught.value.attempts[0].answer is None
    assert caught.value.attempts[0].spent.dollars == 0


async def test_one_loop_reads_a_stream() -> None:
    """The other one waited for it for ever."""
    ask, (model,) = asking(["hello " * 10])
    model.delay_s = 0.01
    stream = ask.stream()
    events = aiter(stream)
    await anext(events)
    async with asyncio.timeout(10):
        with pytest.raises(llm.UsageError, match="one event loop"):
            await asyncio.to_thread(stream.reply)
    await closed(model)


async def closed(model: ScriptedModel) -> None:
    async with asyncio.timeout(10):
        while model.open_streams:  # noqa: ASYNC110  it closes in the loop
            await asyncio.sleep(0)


async def test_a_slow_reader_is_waited_for() -> None:
    """Else all of a long answer was kept for who reads its first lines."""
    made = 0

    async def endless() -> AsyncGenerator[Event, None]:
        nonlocal made
        while True:
            made += 1
            yield Content("x")
            await asyncio.sleep(0)

    source = Source(endless())
    for _ in range(3 * _MOST_WAITING):
        await asyncio.sleep(0)
    assert made == _MOST_WAITING
    assert len(await source.batch()) == _MOST_WAITING
    for _ in range(3 * _MOST_WAITING):
        await asyncio.sleep(0)
    assert made == 2 * _MOST_WAITING
    await source.close()


async def test_what_came_before_a_failure_is_read_first() -> None:
    async def broken() -> AsyncGenerator[Event, None]:
        yield Content("x")
        raise failure("server")

    source = Source(broken())
    assert await source.batch() == [Content("x")]
    with pytest.raises(ProviderFailure):
        await source.batch()
    await source.close()
