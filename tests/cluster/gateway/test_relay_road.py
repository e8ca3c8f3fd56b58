"""Answers that pass as bytes: the provider's own chunks under our id and name, and every promise that events have.

Guards against a fast path that forgets what the slow one keeps: usage, money, continuations, checks of calls, keys.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from behaviours import BEHAVIOURS
from dialects import OpenAIChat, sse
from hypothesis import given, settings
from hypothesis import strategies as st
from journeys import HELLO, text_of
from scripted import HALF, REST, TEXT, Act, Behaviour, Rig, Wire

from diptych.cluster.gateway import attempt, relay
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ports import Context, Ports
from diptych.cluster.gateway.public import AnswerBroken
from diptych.cluster.gateway.record import ExchangeRecord
from diptych.cluster.gateway.relay import Relayed, RelayItem, Verbatim, as_events, read_again
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.signals import Continued
from diptych.cluster.gateway.testing import ScriptedTarget, says
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.deltas import CallBegin, Content
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.relay_names import Names
from diptych.protos.replies import Began, Ended, Event, Reply, Usage

CHAT = OpenAIChat()
MODES = ("openai.chat", "anthropic.messages")


@asynccontextmanager
async def router(
    act: Act | None = None, *, quirks: dict[str, Any] | None = None, ports: Ports | None = None, **route: Any
) -> AsyncIterator[tuple[Gateway, Rig]]:
    """A route `chat` to one provider that does `act`, and `well-FORMAT` to one that is well."""
    behaviour = Behaviour(act or (lambda wire: wire.well()), "answers", "answers")
    pool = ScriptedTarget("pool/own", [says(REST)], is_own=True, continues="exact")
    BEHAVIOURS["here"] = behaviour
    try:
        async with Rig() as rig:
            given = {name: place for name, place in rig.providers(1).items() if name.startswith("rig")}
            given["rig-openai.chat"] |= {"quirks": quirks or {}}
            providers = {name: ProviderSettings.model_validate(place) for name, place in given.items()}
            routes: dict[str, Any] = {codec: {"targets": [f"rig-{codec}/well"]} for codec in MODES}
            routes["chat"] = {"targets": ["rig-openai.chat/here"], "retries": 0, **route}
            read = GatewaySettings.model_validate({"routes": routes})
            async with Gateway(read, Registry.load(providers, {}, {}), targets=[pool], ports=ports) as gateway:
                yield gateway, rig
    finally:
        del BEHAVIOURS["here"]


async def relayed(
    gateway: Gateway, model: str = "chat", **fields: Any
) -> tuple[list[RelayItem], Exception | None, ExchangeRecord, Reply]:
    body = {"model": model, "messages": HELLO, "stream": True, **fields}
    request = parse_chat(json.dumps(body).encode())
    items: list[RelayItem] = []
    error: Exception | None = None
    async with gateway.relay(request, Verbatim(body=body, id="ours-1", model="our \u00f6wn")) as answer:
        try:
            async for item in answer:
                items.append(item)
        except Exception as exc:
            error = exc
    return items, error, answer.record, answer.reply()


def chunks(items: Sequence[RelayItem]) -> list[dict[str, Any]]:
    data = b"".join(item.data for item in items if isinstance(item, Relayed))
    return [json.loads(line[6:]) for line in data.splitlines() if line]


async def test_the_providers_chunks_pass_under_our_names_and_nothing_else_changes() -> None:
    """The last line is the front door's to write, behind the checks of the whole answer; usage only for who asked."""
    async with router() as (gateway, rig):
        items, error, record, reply = await relayed(gateway)
        assert error is None
        theirs = [json.loads(frame[6:]) for frame in CHAT.stream(HALF, REST)[:-2]]
        assert chunks(items) == [chunk | {"id": "ours-1", "model": "our \u00f6wn"} for chunk in theirs]
        assert [type(item) for item in items if not isinstance(item, Relayed)] == [Began, Usage, Ended]
        assert isinstance(items[0], Began)
        assert record.outcome == "answered"
        assert (record.usage.input_tokens, record.usage.output_tokens) == (7, 3)
        assert record.attempts[0].first_ms is not None
        assert reply.message.content == TEXT
        items, *_ = await relayed(gateway, stream_options={"include_usage": True})
        assert chunks(items)[-1]["usage"]["completion_tokens"] == 3
        assert rig.calls["openai.chat", "here", "stream"] == 2


async def test_who_cannot_pass_bytes_on_answers_in_events() -> None:
    """Another format, a schema that has to be adapted, tokens that are wanted with their probabilities."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
    async with router() as (gateway, _):
        for model, fields in (("anthropic.messages", {}), ("chat", {"response_format": form})):
            items, error, _, reply = await relayed(gateway, model, **fields)
            assert error is None
            assert not any(isinstance(item, Relayed) for item in items)
            assert reply.message.content == text_of([item for item in items if not isinstance(item, Relayed)]) != ""


async def test_a_whole_answer_to_a_request_for_a_stream_is_told_and_not_paid_for_twice() -> None:
    async with router(lambda wire: wire.body(CHAT.whole(TEXT))) as (gateway, rig):
        _, error, record, reply = await relayed(gateway)
        assert (error, reply.message.content, len(record.attempts)) == (None, TEXT, 1)
        assert rig.calls.total() == 1


async def cut(wire: Wire) -> None:
    await wire.started()


async def test_an_answer_that_broke_off_goes_on_from_what_its_bytes_said() -> None:
    """Events know the text so far; bytes have to be read once more, and then alone."""
    async with router(cut, fallback=["pool/own"], midstream="continue") as (gateway, _):
        items, error, record, reply = await relayed(gateway)
        assert error is None
        at = next(i for i, item in enumerate(items) if isinstance(item, Continued))
        assert all(isinstance(item, Relayed | Began) for item in items[:at])
        assert not any(isinstance(item, Relayed) for item in items[at:])
        assert reply.message.content == TEXT
        assert [entry.cause for entry in record.attempts] == ["first", "continue"]
        pool = gateway._targets["pool/own"]
        assert isinstance(pool, ScriptedTarget)
        assert pool.requests[0].messages[-1].content == HALF.rstrip()
    async with router(cut, fallback=["pool/own"], midstream="error") as (gateway, _):
        items, error, record, reply = await relayed(gateway)
        assert isinstance(error, AnswerBroken)
        assert reply.message.content == HALF
        assert record.attempts[0].output_chars == len(HALF)  # nobody told tokens: this is what is paid for


async def test_calls_are_checked_before_they_are_told_to_be_complete() -> None:
    """A tool that runs on half of its arguments; a finish that says `stop` where there are calls."""
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}]

    def calls(*pieces: str, finish: str) -> Act:
        frames = [*CHAT.opening(), *CHAT.call(list(pieces)), *CHAT.closing(finish)]
        return lambda wire: wire.frames(*frames)

    async with router(calls('{"city": "Par', finish="tool_calls")) as (gateway, _):
        items, error, *_ = await relayed(gateway, tools=tools)
        assert isinstance(error, AnswerBroken)
        assert "lookup" in str(error)
        assert all(not choice["finish_reason"] for chunk in chunks(items) for choice in chunk["choices"])
    async with router(calls('{"city": ', '"Paris"}', finish="stop")) as (gateway, _):
        items, error, _, reply = await relayed(gateway, tools=tools)
        assert error is None
        assert chunks(items)[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert reply.message.tool_calls[0].arguments == {"city": "Paris"}
        assert reply.ended.finish == "tool_calls"
        assert [event.name for event in as_events(_plain(items)) if isinstance(event, CallBegin)] == ["lookup"]


def _plain(items: Sequence[RelayItem]) -> list[Any]:
    return [item for item in items if not isinstance(item, Continued)]


async def test_words_of_a_provider_become_those_that_clients_know() -> None:
    """Reasoning under another name was not shown; a finish that no client knows ended programs."""
    frames = [
        CHAT._chunk({"role": "assistant", "reasoning": "hm"}),
        CHAT.piece('"reasoning":"x"'),
        CHAT._chunk({}, "eos"),
    ]
    async with router(lambda wire: wire.frames(*frames), quirks={"reasoning_field": "reasoning"}) as (gateway, _):
        items, _, _, reply = await relayed(gateway)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(items)]
    assert deltas == [{"role": "assistant", "reasoning_content": "hm"}, {"content": '"reasoning":"x"'}, {}]
    assert chunks(items)[-1]["choices"][0]["finish_reason"] == "stop"
    assert (reply.message.reasoning_content, reply.message.content) == ("hm", '"reasoning":"x"')


async def test_what_it_cannot_do_is_refused_or_noted_as_on_the_other_road() -> None:
    quirks = {"unsupported": ["seed", "user"], "rename": {"max_completion_tokens": "max_tokens"}}
    async with router(quirks=quirks) as (gateway, rig):
        _, error, *_ = await relayed(gateway, seed=1)
        assert isinstance(error, InvalidRequest)
        assert (error.param, rig.calls.total()) == ("seed", 0)
        _, error, record, _ = await relayed(gateway, user="u", max_completion_tokens=9)
        assert error is None
        assert {(note.kind, note.field) for note in record.notes} == {
            ("omitted", "user"),
            ("renamed", "max_completion_tokens"),
        }


async def test_extras_of_another_provider_do_not_leave_with_the_bytes() -> None:
    """A conversation that began at one provider goes on at another."""
    seen: list[dict[str, Any]] = []

    async def act(wire: Wire) -> None:
        await wire.well()

    async with router(act) as (gateway, rig):
        original = rig._answer

        async def answer(reader: Any, writer: Any) -> bool:
            return await original(_Tapped(reader, seen), writer)

        rig._answer = answer  # type: ignore[method-assign]
        said = {"role": "assistant", "content": "x", "provider_specific_fields": {"gemini.generate": {"sig": "S3CRET"}}}
        _, error, *_ = await relayed(gateway, messages=[*HELLO, said, *HELLO])
        assert error is None
    assert seen
    assert "S3CRET" not in json.dumps(seen)


class _Tapped:
    """A reader that shows the bodies that it gives."""

    def __init__(self, reader: Any, seen: list[dict[str, Any]]) -> None:
        self._reader, self._seen = reader, seen

    async def readexactly(self, n: int) -> bytes:
        data: bytes = await self._reader.readexactly(n)
        self._seen.append(json.loads(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


async def test_an_answer_that_passed_as_bytes_is_kept_like_any_other() -> None:
    """The second client of a cached answer gets events."""
    kept: list[Reply] = []

    class Cache:
        def takes(self, request: ChatRequest, context: Context) -> bool:
            return True

        async def find(self, request: ChatRequest, context: Context) -> Reply | None:
            return kept[0] if kept else None

        async def keep(self, request: ChatRequest, context: Context, reply: Reply) -> None:
            kept.append(reply)

    async with router(ports=Ports(cache=Cache())) as (gateway, rig):
        await relayed(gateway)
        items, _, record, _ = await relayed(gateway)
        assert (record.cache, rig.calls.total()) == ("hit", 1)
        assert text_of(_plain(items)) == TEXT
        assert kept[0].usage.output_tokens == 3


@pytest.mark.parametrize("is_long", [False, True])
async def test_long_answers_are_read_again_beside_the_loop(monkeypatch: pytest.MonkeyPatch, is_long: bool) -> None:
    """64 MiB that a provider sent were parsed while everybody's streams stood still: for the price of an answer without
    usage, for a continuation, for the cache. Calls are read as they pass, once.
    """
    on_loop: list[bool] = []

    def tapped(pieces: Iterable[bytes]) -> list[Event]:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return read_again(pieces)

    monkeypatch.setattr(relay, "read_again", tapped)
    monkeypatch.setattr(relay, "INLINE_BYTES", 100 if is_long else 64 << 10)

    async def ask(gateway: Gateway) -> tuple[ExchangeRecord, bytes]:
        body = {"model": "chat", "messages": HELLO, "stream": True}
        request, passed = parse_chat(json.dumps(body).encode()), b""
        async with gateway.relay(request, Verbatim(body=body, id="i", model="m")) as answer:
            with suppress(AnswerBroken):
                async for item in answer:
                    passed += item.data if isinstance(item, Relayed) else b""
        return answer.record, passed

    async with router(cut, fallback=["pool/own"], midstream="continue") as (gateway, _):
        record, _ = await ask(gateway)
    assert (record.outcome, record.attempts[0].output_chars) == ("answered", len(HALF))
    assert on_loop == [not is_long] * 2
    async with router(ports=Ports(cache=_AllKept())) as (gateway, _):
        await ask(gateway)
    assert set(on_loop) == {not is_long}
    on_loop.clear()
    frames = [*CHAT.opening(), *CHAT.call(['{"city": ', '"Par']), *CHAT.closing("tool_calls")]
    async with router(lambda wire: wire.frames(*frames)) as (gateway, _):
        record, passed = await ask(gateway)
    assert record.outcome == "answer_broken"
    assert b'"finish_reason":"' not in passed.replace(b" ", b"")
    assert on_loop == [not is_long] * 2  # for the price and for what might go on: not for the check


async def test_an_answer_that_takes_long_to_read_again_has_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited for the end of a stream no longer than a second took its length away with it: it was free."""
    monkeypatch.setattr(attempt, "_DRAIN_S", 0.0)
    monkeypatch.setattr(relay, "INLINE_BYTES", 1)
    finish, _, done = CHAT.closing()
    async with router(lambda wire: wire.frames(*CHAT.opening(), CHAT.piece(TEXT), finish, done)) as (gateway, _):
        _, error, record, _ = await relayed(gateway)
    assert (error, record.outcome, record.attempts[0].output_chars) == (None, "answered", len(TEXT))


class _AllKept:
    """A cache that takes everything and has nothing."""

    def takes(self, request: ChatRequest, context: Context) -> bool:
        return True

    async def find(self, request: ChatRequest, context: Context) -> Reply | None:
        return None

    async def keep(self, request: ChatRequest, context: Context, reply: Reply) -> None:
        assert reply.message.content == TEXT


texts = st.text(max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"id": texts, "model": texts, "said": texts}), min_size=1, max_size=5),
    st.sampled_from([(",", ":"), (", ", ": ")]),
    st.booleans(),
    st.booleans(),
    texts,
)
def test_only_the_names_of_a_chunk_change(
    given: list[dict[str, str]], separators: tuple[str, str], is_ascii: bool, is_last: bool, ours: str
) -> None:
    """Bytes that look like a name within a text, names that change or are empty, JSON written in other ways."""
    names = Names(id=ours, model="m")
    for one in given:
        text = f'"id":"{one["id"]}","model": "{one["model"]}"' + one["said"]
        delta = {"content": text, "tool_calls": [{"id": "", "model": one["said"]}]}
        chunk = {"id": one["id"], "model": one["model"], "choices": [{"delta": delta, "finish_reason": None}]}
        if is_last:
            chunk["model"] = chunk.pop("model")
        frame = b"data: " + json.dumps(chunk, separators=separators, ensure_ascii=is_ascii).encode() + b"\n\n"
        told = json.loads(names(frame)[6:])
        assert told == chunk | {"id": ours, "model": "m"}


@pytest.mark.parametrize(
    "block", [b": ping\n\n", b"data: [DONE]\n\n", b"data: [1]\n\n", b"retry: 5\n\n", b"data: {\n\n"]
)
def test_what_is_no_chunk_does_not_pass(block: bytes) -> None:
    assert Names(id="a", model="b")(block) == b""


def test_bytes_that_cannot_be_read_again_end_what_is_read() -> None:
    """A failure while a failure is being looked into."""
    assert read_again(
        [sse({"id": "c", "choices": [{"delta": {"content": "a"}}]}), b"x" * 10, b"data: nonsense\n\n"]
    ) == [
        Began("c", ""),
        Content("a"),
    ]
