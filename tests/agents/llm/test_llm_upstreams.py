"""One function, three kinds of servers, equal replies: a Diptych cluster, an OpenAI-shaped and an Anthropic-shaped one.

All over real sockets. Guards against a reply that tells by its shape who answered: other finish words, calls without
their arguments, reasoning in the text, errors of another kind, usage that is counted otherwise in streams.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
from dialects import USAGE, Anthropic, Bedrock, Dialect, Gemini, OpenAIChat, OpenAIResponses
from provider_wire import Behaviour, answers, framed, head, sends, wire
from pydantic import BaseModel, Field
from small_host import hosted

from diptych.agents import llm
from diptych.protos.replies import Reply as Answer

DIALECTS: list[Dialect] = [OpenAIChat(), OpenAIResponses(), Anthropic(), Gemini(), Bedrock()]
SHAPES = [OpenAIChat(), Anthropic()]
KEY = "sk-test-0123456789abcdefghij"


class Book(BaseModel):
    title: str
    year: int


@asynccontextmanager
async def served(shape: Dialect, *behaviours: Behaviour) -> AsyncIterator[tuple[Any, Any]]:
    """A server of this shape, and a registry that knows it as `lab`."""
    async with wire(*behaviours) as told:
        lab = {"base_url": f"http://127.0.0.1:{told.port}/v1", "codec": shape.codec, "api_key": "env:LAB_KEY"}
        if shape.codec == "bedrock.converse":
            lab["auth"] = "bearer"
        registry = llm.Registry(providers={"lab": lab}, environ={"LAB_KEY": KEY})
        try:
            yield registry, told
        finally:
            await registry.close.aio()
            await asyncio.to_thread(registry.close)


def ask(registry: llm.Registry, **settings: Any) -> Any:
    @llm.call("lab/m", registry=registry, **{"retries": llm.Retries(attempts=1), "max_tokens": 100, **settings})
    def question(topic: str) -> list[Any]:
        return [llm.system("Be brief."), llm.user(f"Tell of {topic}")]

    return question


def streamed(shape: Dialect, *frames: bytes) -> Behaviour:
    told = {"content_type": shape.stream_type, "transfer_encoding": "chunked"}
    return sends(head(**told), *map(framed, frames), b"0\r\n\r\n")


def same(reply: llm.Reply[Any]) -> dict[str, Any]:
    """All of a reply that has nothing of its provider's: ids of calls and of answers are theirs."""
    return {
        "value": reply.result,
        "text": reply.text,
        "thoughts": reply.thoughts,
        "finish": reply.finish,
        "calls": [(call.name, call.arguments, json.loads(call.text)) for call in reply.tool_calls],
        "usage": (reply.usage.input_tokens, reply.usage.output_tokens),
        "spent": (reply.spent.requests, reply.spent.tokens),
        "roles": [message.role for message in reply.messages],
        "said": [message.content for message in reply.messages],
        "attempts": [(attempt.number, attempt.why, attempt.error) for attempt in reply.attempts],
    }


@llm.tool
def lookup(query: str) -> str:
    """Looks something up."""
    return f"found {query}"


WHOLE: dict[str, tuple[dict[str, Any], Callable[[Dialect], dict[str, Any]]]] = {
    "text": ({}, lambda shape: shape.whole("Hello there.")),
    "typed": ({"output": Book}, lambda shape: shape.whole('{"title": "Emma", "year": 1815}')),
    "list": ({"output": list[int]}, lambda shape: shape.whole('{"value": [1, 2, 3]}')),
    "tools": ({"tools": [lookup]}, lambda shape: shape.whole_call('{"query": "x"}')),
    "cut": ({}, lambda shape: shape.whole("Hello th", "length")),
}


async def in_both_ways(shape: Dialect, settings: dict[str, Any], body: dict[str, Any]) -> list[dict[str, Any]]:
    async with served(shape, answers(body)) as (registry, told):
        question = ask(registry, **settings)
        replies = [await question.aio("x"), await asyncio.to_thread(question, "x")]
        assert [seen.line.split()[0] for seen in told.seen] == ["POST", "POST"]
        assert all(reply.raw == body for reply in replies)
    return [same(reply) for reply in replies]


@pytest.mark.parametrize("what", WHOLE)
async def test_whole_replies_are_equal(what: str) -> None:
    settings, body = WHOLE[what]
    found = [one for shape in DIALECTS for one in await in_both_ways(shape, settings, body(shape))]
    assert found[0]["usage"] == USAGE
    assert found[0]["spent"] == (1, sum(USAGE))
    for other in found[1:]:
        assert other == found[0]


STREAMED: dict[str, tuple[dict[str, Any], Callable[[Dialect], list[bytes]]]] = {
    "text": ({}, lambda shape: shape.stream("Hel", "lo ", "there.")),
    "typed": ({"output": Book}, lambda shape: shape.stream('{"title": "Em', 'ma", "year": ', "1815}")),
    "tools": (
        {"tools": [lookup]},
        lambda shape: [*shape.opening(), *shape.call(['{"que', 'ry": "x"}']), *shape.closing("tool_calls")],
    ),
    "cut": ({}, lambda shape: [*shape.opening(), shape.piece("Hello th"), *shape.closing("length")]),
}


@pytest.mark.parametrize("what", STREAMED)
async def test_streams_are_equal_to_one_another_and_to_whole_answers(what: str) -> None:
    settings, frames = STREAMED[what]
    found = []
    for shape in DIALECTS:
        async with served(shape, streamed(shape, *frames(shape))) as (registry, _):
            question = ask(registry, **settings)
            async with question.stream("x") as stream:
                pieces = [piece async for piece in stream.text()]
            reply = await stream.reply.aio()
            assert "".join(pieces) == reply.text
            found.append(same(reply))
            plain = await asyncio.to_thread(question.stream("x").reply)
            found.append(same(plain))
    for other in found[1:]:
        assert other == found[0]
    settings, body = WHOLE[what]
    (whole, _) = await in_both_ways(OpenAIChat(), settings, body(OpenAIChat()))
    assert {**found[0], "text": "", "said": [], "value": 0} == {**whole, "text": "", "said": [], "value": 0}


ERRORS = [
    ("401 Unauthorized", "auth", "auth"),
    ("404 Not Found", "missing", "not_found"),
    ("429 Too Many Requests", "rate_limit", "rate_limited"),
    ("500 Internal Server Error", "server", "server"),
    ("503 Service Unavailable", "overloaded", "overloaded"),
    ("400 Bad Request", "context", "context_length"),
]


@pytest.mark.parametrize(("status", "error", "kind"), ERRORS)
async def test_errors_are_equal(status: str, error: str, kind: str) -> None:
    for shape in DIALECTS:
        body = shape.error(error, f"as told about {KEY}")
        async with served(shape, answers(body, status)) as (registry, _):
            with pytest.raises(llm.ProviderError) as caught:
                await ask(registry).aio("x")
            assert caught.value.failure.kind == kind, shape.codec
            assert caught.value.failure.status == int(status[:3])
            assert len(caught.value.attempts) == 1
            assert KEY not in f"{caught.value} {caught.value!r} {caught.value.attempts!r}"


async def test_reasoning_is_equal_and_not_in_the_text() -> None:
    openai, anthropic = OpenAIChat().whole("4"), Anthropic().whole("4")
    openai["choices"][0]["message"]["reasoning_content"] = "2 and 2."
    anthropic["content"].insert(0, {"type": "thinking", "thinking": "2 and 2.", "signature": "s"})
    found = []
    for shape, body in ((OpenAIChat(), openai), (Anthropic(), anthropic)):
        async with served(shape, answers(body)) as (registry, _):
            found.append(same(await ask(registry).aio("x")))
    assert found[0] == found[1]
    assert (found[0]["text"], found[0]["thoughts"]) == ("4", "2 and 2.")


async def test_a_loop_with_tools_goes_on_in_both_shapes() -> None:
    """The second request has the call and its result, as each format wants them."""
    for shape in SHAPES:
        behaviours = answers(shape.whole_call('{"query": "x"}')), answers(shape.whole("It is x."))
        async with served(shape, *behaviours) as (registry, told):
            reply = await ask(registry, tools=[lookup]).aio("x")
            reply = await reply.resume.aio(await reply.run_tools.aio())
            assert reply.text == "It is x."
            assert [message.role for message in reply.messages] == ["system", "user", "assistant", "tool", "assistant"]
            assert b"found x" in told.seen[1].body


async def test_a_reask_goes_on_in_both_shapes() -> None:
    for shape in SHAPES:
        bodies = ('{"title": "Emma", "year": "soon"}', '{"title": "Emma", "year": 1815}')
        async with served(shape, *(answers(shape.whole(body)) for body in bodies)) as (registry, told):
            reply = await ask(registry, output=Book, retries=llm.Retries(attempts=2)).aio("x")
            assert reply.value == Book(title="Emma", year=1815)
            assert [attempt.why for attempt in reply.attempts] == ["first", "reask"]
            assert b"year" in told.seen[1].body


class Held(BaseModel):
    """Short: an echoing engine writes whatever the grammar allows."""

    title: str = Field(max_length=8)
    year: int = Field(ge=1900, le=1999)


@llm.tool
def pick(query: Literal["left", "right"]) -> str:
    """Picks one."""
    return query


OWN: dict[str, dict[str, Any]] = {
    "text": {"max_tokens": 12},
    "typed": {"output": Held},
    "list": {"output": Annotated[list[Literal["red", "green"]], Field(min_length=2, max_length=3)]},
    "tools": {"tools": [replace(pick, name="lookup")], "tool_choice": "required"},
}


@pytest.fixture(scope="module")
def own() -> Iterator[str]:
    """The address of a cluster with real grammars and no model."""
    with hosted() as running:
        yield running.listener.url


@pytest.mark.parametrize("what", OWN)
async def test_an_own_cluster_answers_as_the_others_do(own: str, what: str) -> None:
    """Whole, in pieces and synchronously; and the same words from all others make the same reply."""
    registry = llm.Registry(environ={}, clusters={"lab": llm.Cluster(own)})
    question = ask(registry, temperature=0.0, **OWN[what]).with_(model="lab/echo")
    reply = await question.aio("x")
    stream = await question.stream("x").reply.aio()
    plain = await asyncio.to_thread(question, "x")
    await registry.close.aio()
    await asyncio.to_thread(registry.close)
    assert reply.text or reply.tool_calls
    assert same(stream) == same(reply) == same(plain)
    assert reply.cost is None
    assert isinstance(reply.answer, Answer)
    assert reply.usage.input_tokens
    assert reply.usage.output_tokens
    uncounted = {"usage": None, "spent": None}
    for shape in DIALECTS:
        calls = reply.tool_calls
        body = shape.whole_call(calls[0].text) if calls else shape.whole(reply.text, reply.finish)
        for again in await in_both_ways(shape, OWN[what], body):
            assert {**again, **uncounted} == {**same(reply), **uncounted}, shape.codec
