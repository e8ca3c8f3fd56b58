"""Typed calls against an own cluster: a listener, a router and two engines with real grammars and no model.

Guards against requests that the API refuses, server-told parts that nobody sends, repairs that the grammar does not
take, and answers that go on being generated, and hold KV, when their reader has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from small_cluster import SmallCluster
from small_host import hosted

from diptych.agents import llm


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=3, le=99)
    tags: list[Literal["red", "green"]] = Field(min_length=2, max_length=3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SmallCluster]:
    with hosted() as running:
        yield running


@pytest.fixture
def registry(cluster: SmallCluster) -> llm.Registry:
    return llm.Registry(clusters={"pool": llm.Cluster(url=cluster.listener.url)}, environ={})


async def at_rest(cluster: SmallCluster) -> None:
    """Nothing is held. AssertionError with what is left."""
    for blocks in (await cluster.at_rest()).values():
        assert blocks.used == 0


TYPES: list[Any] = [
    Person,
    list[Person],
    int,
    bool,
    Literal["yes", "no"],
    datetime.date,
    datetime.datetime,
    dict[str, int],
    Person | int,
    Person | None,
    tuple[int, bool],
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
async def test_every_finished_answer_is_of_its_type_at_once(registry: llm.Registry, kind: Any) -> None:
    @llm.call("pool/echo", output=kind, registry=registry, max_tokens=200, retries=llm.Retries(attempts=1))
    async def ask() -> str:
        return "Anybody."

    with contextlib.suppress(llm.Truncated):  # nothing else may go wrong
        reply = await ask()
        assert [attempt.why for attempt in reply.attempts] == ["first"]
        assert reply.usage.output_tokens


def test_what_an_own_engine_alone_knows_is_taken(registry: llm.Registry) -> None:
    @llm.call("pool/echo", registry=registry, max_tokens=20, options={"pool": {"guided_regex": "[a-c]{3}-[0-9]"}})
    def ask() -> str:
        return "Anything."

    assert len(ask().text) == 5

    @llm.call(
        "pool/echo",
        registry=registry,
        max_tokens=3,
        session="s1",
        options={"pool": {"min_p": 0.05, "priority": 2, "ignore_eos": True, "explain": True}},
    )
    def other() -> str:
        return "Anything else."

    reply = other()
    assert reply.usage.output_tokens == 3
    assert reply.raw["diptych"]


@pytest.mark.parametrize("grow", [True, False])
def test_parts_come_as_they_close_and_make_the_value(registry: llm.Registry, grow: bool) -> None:
    """With grow=False the server tells the parts, and nothing is parsed here."""

    @llm.call("pool/echo", output=Person, registry=registry, max_tokens=200)
    def ask() -> str:
        return "Anybody."

    stream = ask.stream()
    told = None
    for told in stream.partials(grow=grow):
        assert told.age is llm.UNSET or isinstance(told.age, int)
    assert told is not None
    assert told.to_dict() == stream.reply().value.model_dump()


def test_a_wrong_field_is_made_anew_behind_what_stands_before_it(registry: llm.Registry) -> None:
    class Looked(BaseModel):
        name: str = Field(max_length=8)
        age: int = Field(ge=3, le=99)

        @field_validator("age")
        @classmethod
        def second(cls, age: int, info: ValidationInfo) -> int:
            seen = info.context
            seen.append(age)
            if len(seen) == 1:
                raise ValueError("look again")
            return age

    seen: list[int] = []

    @llm.call("pool/echo", output=Looked, registry=registry, max_tokens=100, validation=seen)
    def ask() -> str:
        return "Anybody."

    reply = ask()
    assert [attempt.why for attempt in reply.attempts] == ["first", "repair"]
    assert len(seen) == 2
    first, second = reply.attempts
    kept = first.text[: first.text.index('"age"')]
    assert reply.text.startswith(kept)
    assert reply.value.name in kept
    (body,) = second.raw
    assert reply.text.endswith(body["choices"][0]["message"]["content"])
    assert second.spent.output_tokens < first.spent.output_tokens


async def test_who_leaves_frees_the_engines(cluster: SmallCluster, registry: llm.Registry) -> None:
    @llm.call("pool/echo", registry=registry, max_tokens=2000, options={"pool": {"ignore_eos": True}})
    async def ask(about: str) -> str:
        return about

    for at in range(3):
        async for _ in ask.stream(f"stream {at}").text():
            break
    async with ask.stream("left by a block") as stream:
        async for _ in stream.text():
            break
    asked = [asyncio.create_task(ask.aio(f"whole {at}")) for at in range(4)]
    streams = [asyncio.create_task(anext(aiter(ask.stream(f"first {at}")))) for at in range(4)]
    await asyncio.gather(*streams)
    for task in asked:
        task.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*asked, return_exceptions=True))
    await at_rest(cluster)


def test_who_leaves_a_plain_loop_frees_them_too(cluster: SmallCluster, registry: llm.Registry) -> None:
    @llm.call("pool/echo", registry=registry, max_tokens=2000, options={"pool": {"ignore_eos": True}})
    def ask(about: str) -> str:
        return about

    for _ in ask.stream("plain").text():
        break
    with contextlib.suppress(ZeroDivisionError), ask.stream("raises") as stream:
        for _ in stream.text():
            raise ZeroDivisionError
    asyncio.run(at_rest(cluster))


def test_hundreds_at_once_behind_a_limiter(cluster: SmallCluster, registry: llm.Registry) -> None:
    @llm.call("pool/echo", output=int, registry=registry, max_tokens=20, limiter=llm.Limiter(64))
    async def ask(number: int) -> str:
        return f"Number {number}."

    async def all_of_them() -> list[int]:
        return [reply.value for reply in await asyncio.gather(*(ask(number) for number in range(200)))]

    assert len(asyncio.run(all_of_them())) == 200
    asyncio.run(at_rest(cluster))
