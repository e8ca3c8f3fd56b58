"""An own pool as a target of the gateway.

Guards: two roads to one answer that drift apart; a tenant, a deadline or a session that is lost on the way to the
engines; errors whose kind lets the gateway ask nobody else, or everybody; tokens that nobody pays for; a piece of an
answer that comes twice, or never, when an engine dies under it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.api.chat import ChatEndpoint
from diptych.cluster.api.generation import Generator, Origin
from diptych.cluster.api.pool_target import PoolTarget, pool_targets
from diptych.cluster.api.render import Renderer
from diptych.cluster.api.served import NO_FORMAT, ServedModel
from diptych.cluster.api.testing import MODEL, TEMPLATE, byte_level_tokenizer
from diptych.cluster.config import LimitSettings
from diptych.cluster.formats.calls import write_calls
from diptych.cluster.formats.format import HERMES, REASONING_FORMATS, Format
from diptych.cluster.gateway.continuation import may_go_on
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ports import Context
from diptych.cluster.gateway.public import AnswerBroken
from diptych.cluster.gateway.record import AttemptRecord
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.signals import Continued
from diptych.cluster.gateway.testing import ScriptedTarget, fails
from diptych.cluster.providers.terms import Terms
from diptych.cluster.router.rig import PAIR, D, P, Rig, rig, until
from diptych.cluster.router.testing import EchoEngine
from diptych.protos.deltas import Content, Logprobs, Reasoning
from diptych.protos.errors import Cancelled, ContextTooLong, EngineError, InvalidRequest
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage

# The echo says what the system message says; what stands behind it is there to be read by format detection alone.
SAYS_SYSTEM = "{{ messages[0]['content'] }}<|im_end|>{% if tools or enable_thinking %} {% endif %}"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("look", "count")
]
CALLS = [("look", '{"at": "the sea"}'), ("count", "{}")]
HELLO = [{"role": "user", "content": "hello to the world"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
DROPS = 200


@dataclass
class OwnPool:
    """A router with its echo engines, a model as the API knows it, and the target that both are."""

    rig: Rig
    served: ServedModel
    target: PoolTarget

    @property
    def prefill(self) -> EchoEngine:
        return self.rig.engines["p"]

    @property
    def decode(self) -> EchoEngine:
        return self.rig.engines["d"]

    def tokens(self, text: str) -> list[int]:
        return list(self.served.renderer.tokenizer.encode(text).ids)

    def text(self, tokens: Sequence[int], *, is_shown: bool = False) -> str:
        return str(self.served.renderer.tokenizer.decode(list(tokens), skip_special_tokens=is_shown))

    async def events(self, request: ChatRequest) -> list[Event]:
        return [event async for event in self.target.stream(request, terms(), record())]


@asynccontextmanager
async def own_pool(
    folder: Path, *, template: str = TEMPLATE, format: Format = NO_FORMAT, roles: Any = None, **options: Any
) -> AsyncIterator[OwnPool]:
    """Everything started and connected; `options` are the rig's."""
    tokenizer = byte_level_tokenizer()
    served = ServedModel(
        name=MODEL,
        renderer=Renderer(tokenizer, template),
        vocab_size=tokenizer.get_vocab_size(),
        max_context_tokens=2048,
        eos_token_ids=frozenset(tokenizer.encode("<|im_end|>").ids),
        format=format,
    )
    try:
        async with rig(folder, PAIR if roles is None else roles, **options) as made:
            (target,) = pool_targets(made.router, [served])
            yield OwnPool(made, served, target)
    finally:
        served.renderer.close()


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[OwnPool]:
    async with own_pool(tmp_path) as made:
        yield made


@pytest.fixture
async def sayer(tmp_path: Path) -> AsyncIterator[OwnPool]:
    """Of a model that thinks and calls tools, as its system message tells it to."""
    async with own_pool(tmp_path, template=SAYS_SYSTEM, format=Format(HERMES, REASONING_FORMATS["think"])) as made:
        yield made


def said(system: str, **fields: Any) -> dict[str, Any]:
    told = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    return {"model": MODEL, "messages": told, "max_tokens": 300, "temperature": 0, **fields}


def asked(body: dict[str, Any]) -> ChatRequest:
    return parse_chat(json.dumps(body).encode())


def hello(**fields: Any) -> ChatRequest:
    return asked({"model": "chat", "messages": HELLO, "max_tokens": 8, **fields})


def record(**fields: Any) -> AttemptRecord:
    return AttemptRecord(target="pool/echo", group="chat", cause=fields.pop("cause", "first"), began_ms=0, **fields)


def terms(seconds: float = 20.0) -> Terms:
    return Terms(asyncio.get_running_loop().time() + seconds)


async def listen(events: AsyncIterable[Any], told: list[Event]) -> None:
    async for event in events:
        told.append(event)


def gateway(*targets: Any, **route: Any) -> Gateway:
    mine = {"targets": [one.name for one in targets], "strategy": "priority", **route}
    return Gateway(GatewaySettings.model_validate({"routes": {"chat": mine}}), targets=targets)


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "text": said("the quick brown fox"),
    "cut": said("the quick brown fox", max_tokens=4),
    "stop": said("the quick brown fox", stop=["own f", "x"]),
    "stop kept": said("the quick brown fox", stop="own f", include_stop_str_in_output=True),
    "reasoning": said("<think>hm, hm</think>done"),
    "hidden reasoning": said("<think>hm, hm</think>done", include_reasoning=False),
    "calls": said("Sure. " + write_calls(HERMES, CALLS, in_text=True), tools=TOOLS),
    "a named call": said(
        write_calls(HERMES, CALLS[:1]), tools=TOOLS, tool_choice={"type": "function", "function": {"name": "look"}}
    ),
    "functions": said(write_calls(HERMES, CALLS[:1]), functions=[tool["function"] for tool in TOOLS]),
    "logprobs": said("the quick", logprobs=True, top_logprobs=2),
    "logprobs of a stop": said("the quick brown", logprobs=True, stop="ow"),
    "prompt_logprobs": said("the quick", prompt_logprobs=1),
    "nothing": said(""),
}


async def test_it_says_what_the_own_road_says_whole_and_streamed(sayer: OwnPool) -> None:
    own = Generator(ChatEndpoint(), sayer.rig.router, {MODEL: sayer.served})
    for name, body in CONVERSATIONS.items():
        origin = Origin(tenant="", arrived_at=sayer.rig.router.clock())
        answer = await own.whole(await own.prepare(asked(body), origin))
        reply = await sayer.target.whole(asked(body), terms(), record())
        assert_same(reply, answer, name)
        events = await sayer.events(asked(body))
        assert [type(event) for event in (*events[:1], *events[-2:])] == [Began, Usage, Ended], name
        assert events[1] == Usage(input_tokens=reply.usage.input_tokens), name
        assert [type(event) for event in events].count(Ended) == 1, name
        builder = ReplyBuilder()
        for event in events:
            builder.add(event)
        assert without_ids(builder.reply()) == without_ids(reply), name


def assert_same(reply: Reply, answer: dict[str, Any], name: str) -> None:
    (choice,) = answer["choices"]
    message, used = choice["message"], answer["usage"]
    assert (reply.message.content or None) == (message["content"] or None), name
    assert reply.message.reasoning_content == message.get("reasoning_content"), name
    calls = [call["function"] for call in message.get("tool_calls", [])] or [message.get("function_call")]
    told = [{"name": call.name, "arguments": call.text} for call in reply.message.tool_calls]
    assert (told or [None]) == calls, name
    assert all(call.id.startswith("call_") for call in reply.message.tool_calls), name
    assert reply.ended.finish == choice["finish_reason"].replace("function_call", "tool_calls"), name
    assert reply.usage == Usage(
        input_tokens=used["prompt_tokens"],
        output_tokens=used["completion_tokens"],
        cache_read_tokens=used["prompt_tokens_details"]["cached_tokens"],
        cache_write_tokens=0,
        reasoning_tokens=used["completion_tokens_details"]["reasoning_tokens"],
    ), name
    logprobs = reply.logprobs or Logprobs()
    assert list(logprobs.content) == (choice["logprobs"] or {"content": []})["content"], name
    assert logprobs.prompt == answer.get("prompt_logprobs"), name


def without_ids(reply: Reply) -> str:
    text = repr(reply).replace(reply.began.id, "")
    for call in reply.message.tool_calls:
        text = text.replace(call.id, "")
    return text


async def test_the_record_and_the_end_tell_how_it_was_answered(sayer: OwnPool) -> None:
    entry = record()
    reply = await sayer.target.whole(asked(said("the fox", explain=True)), terms(), entry)
    assert entry.explanation is not None
    assert entry.explanation["decode_engine"] == "d"
    assert entry.told()["explanation"] == entry.explanation
    assert entry.usage == reply.usage
    stopped = await sayer.target.whole(asked(CONVERSATIONS["stop"]), terms(), record())
    assert stopped.ended.stop_text == "own f"
    cut = await sayer.target.whole(asked(CONVERSATIONS["cut"]), terms(), record())
    assert (cut.ended.finish, cut.ended.native, cut.ended.stop_text) == ("length", "length", None)
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await sayer.target.whole(asked(said("{}", response_format=form)), terms(), noted := record())
    assert [(note.kind, note.field) for note in noted.notes] == [("adapted", "response_format.json_schema.schema")]
    assert "uniqueItems" in noted.notes[0].words


async def test_the_request_reaches_the_engines_as_its_tenants(pool: OwnPool) -> None:
    """KV of two tenants must not be shared, nor their turns mixed up."""
    clock = pool.rig.router.clock
    began = clock()
    origin = Origin(tenant="red", session="s1", arrived_at=clock() - 1.5)
    for context in (Context(tenant="blue", session="talk"), Context(tenant="blue", origin=origin)):
        await pool.target.whole(hello(priority=3, timeout_s=900), terms(7.0), record(context=context))
    await pool.target.whole(hello(), terms(7.0), record(context=Context(origin=origin), cause="fallback"))
    await pool.target.whole(hello(), terms(7.0), record())
    requests = [order.request for order in pool.decode.orders]
    assert [request.tenant for request in requests] == ["blue", "red", "red", ""]
    assert [request.salt for request in requests] == [b"blue", b"red", b"red", b""]
    assert [request.priority for request in requests] == [3, 3, 0, 0]
    for request in requests:  # the attempt's, and neither the client's 900 s nor the router's 30
        assert began + 7.0 <= request.deadline <= clock() + 7.0


async def test_the_engines_are_told_of_the_attempts_span(pool: OwnPool) -> None:
    """Of the caller's alone, an engine's spans would stand beside the attempt that they are a part of."""
    caller, attempt = (f"00-{'ab' * 16}-{span * 8}-01" for span in ("cd", "ef"))
    origin = Origin(tenant="red", arrived_at=pool.rig.router.clock(), traceparent=caller)
    for context in (Context(origin=origin, traceparent=caller), Context(traceparent=caller), None):
        await pool.target.whole(hello(), terms(), record(context=context, traceparent=attempt))
    await pool.target.whole(hello(), terms(), record(context=Context(origin=origin)))
    assert [order.request.traceparent for order in pool.decode.orders] == [attempt] * 3 + [caller]


async def test_an_effort_that_no_template_has_a_word_for_is_noted(tmp_path: Path) -> None:
    template = TEMPLATE + "{% if reasoning_effort == 'high' %}!{% endif %}"
    async with own_pool(tmp_path, template=template) as reader:
        for effort, words in (("max", ["high, the most that chat templates know"]), ("high", [])):
            await reader.target.whole(hello(reasoning_effort=effort), terms(), noted := record())
            assert [note.words for note in noted.notes] == words


async def test_a_tracked_request_is_cancelled_by_its_id(tmp_path: Path) -> None:
    async def leave_amid(pool: OwnPool) -> None:
        registry, now = pool.rig.router.requests, pool.rig.router.clock()
        with registry.request("chatcmpl-1", tenant="red", endpoint="/x", born=now) as tracked:
            context = Context(origin=Origin(tenant="red", arrived_at=now, tracked=tracked))
            async for event in pool.target.stream(hello(max_tokens=900), terms(), record(context=context)):
                if isinstance(event, Began):
                    assert event == Began("chatcmpl-1", MODEL)
                    assert len(tracked.lives) == 1
                    tracked.cancel()

    async with own_pool(tmp_path, step_s=0.002) as pool:
        with pytest.raises(ProviderFailure) as caught:
            await leave_amid(pool)
        assert caught.value.failure.kind is FailureKind.CANCELLED
        assert isinstance(caught.value.__cause__, Cancelled)


async def test_who_leaves_cancels_at_the_engines_and_pays_for_what_was_made(tmp_path: Path) -> None:
    async with own_pool(tmp_path, step_s=0.002) as pool:
        entry = record()
        events = pool.target.stream(hello(max_tokens=900), terms(), entry)
        while not isinstance(await anext(events), Content):
            pass
        await events.aclose()
        await until(lambda: pool.decode.open_orders == 0)
        (request,) = {order.request.prompt for order in pool.decode.orders}
        assert entry.usage.input_tokens == len(request)
        assert entry.usage.output_tokens is not None
        assert 1 <= entry.usage.output_tokens < 900


async def test_what_the_model_cannot_do_another_target_may(pool: OwnPool) -> None:
    """Nothing was computed, so that the next target is asked at no cost; the client of the last one hears our words."""
    for fields, kind, param in (
        ({"messages": IMAGE}, FailureKind.UNSUPPORTED, "messages[0].content[0]"),
        ({"logit_bias": {"99999": 1}}, FailureKind.UNSUPPORTED, "logit_bias"),
        ({"chat_template_kwargs": {"flavour": 1}}, FailureKind.UNSUPPORTED, "chat_template_kwargs.flavour"),
        ({"max_tokens": 5000}, FailureKind.CONTEXT_LENGTH, "max_tokens"),
    ):
        with pytest.raises(ProviderFailure) as caught:
            await pool.target.whole(hello(**fields), terms(), record())
        assert (caught.value.failure.kind, caught.value.failure.param) == (kind, param)
        assert caught.value.target == "pool/echo"
        assert isinstance(caught.value.__cause__, InvalidRequest | ContextTooLong)
    assert pool.decode.orders == []
    with pytest.raises(InvalidRequest) as told:
        await gateway(pool.target).answer(hello(messages=IMAGE))
    assert told.value.param == "messages[0].content[0]"
    eyes = ScriptedTarget("p/eyes", [[Began(), Content("a cat"), Usage(), Ended("stop")]])
    reply, story = await gateway(pool.target, eyes).answer(hello(messages=IMAGE))
    assert reply.message.content == "a cat"
    assert story.failures == (FailureKind.UNSUPPORTED,)


async def test_check_knows_the_same_without_counting_tokens(sayer: OwnPool, tmp_path: Path) -> None:
    sayer.target.check(hello(max_tokens=5000))
    thrifty = hello().model_copy(update={"reasoning_budget": 5})  # its markers are words: no engine sees where they end
    for request, param in (
        (hello(messages=IMAGE), "messages[0].content[0]"),
        (hello(chat_template_kwargs={"flavour": 1}), "chat_template_kwargs.flavour"),
        (thrifty, "reasoning_budget"),
    ):
        with pytest.raises(ProviderFailure) as caught:
            sayer.target.check(request)
        assert (caught.value.failure.kind, caught.value.failure.param) == (FailureKind.UNSUPPORTED, param)
        explained = gateway(sayer.target).explain(request)
        assert explained.candidates[0].excluded == caught.value.failure.message


async def test_a_full_pool_a_silent_one_and_a_faulty_one_have_their_kinds(tmp_path: Path) -> None:
    limits = LimitSettings(max_running=1, max_waiting=0, request_timeout_s=0.2)
    async with own_pool(tmp_path, limits=limits) as pool:
        pool.decode.faults.silent = pool.prefill.faults.silent = True
        waiting = asyncio.create_task(pool.target.whole(hello(), terms(), record()))
        await until(lambda: pool.rig.router.admission.running == 1)
        kinds = []
        with pytest.raises(ProviderFailure) as full:
            await pool.target.whole(hello(), terms(), record())
        assert full.value.failure.retry_after_s is not None
        with pytest.raises(ProviderFailure) as late:  # by the pool's own limit: another target has time left
            await waiting
        pool.decode.faults.silent = pool.prefill.faults.silent = False
        pool.decode.faults.error, pool.decode.faults.error_at = EngineError("it hurts"), 3
        told: list[Event] = []
        with pytest.raises(ProviderFailure) as faulty:
            await listen(pool.target.stream(hello(), terms(), record()), told)
        kinds = [caught.value.failure.kind for caught in (full, late, faulty)]
        assert kinds == [FailureKind.OVERLOADED, FailureKind.FIRST_TOKEN_TIMEOUT, FailureKind.SERVER]
        assert isinstance(told[-1], Usage)  # what is to be paid for, and how many tokens are left
        assert told[-1].output_tokens == 3


async def test_hidden_reasoning_gives_signs_of_life(sayer: OwnPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that thinks where nobody sees it would be taken for one that hangs."""
    monkeypatch.setattr("diptych.cluster.api.pool_target.SIGN_S", 0.0)
    events = await sayer.events(asked(CONVERSATIONS["hidden reasoning"]))
    assert not [event for event in events if isinstance(event, Reasoning)]
    counts = [event.output_tokens for event in events if isinstance(event, Usage) and event.output_tokens is not None]
    assert len(counts) > 5
    assert counts == sorted(counts)


async def test_a_text_that_broke_off_elsewhere_goes_on_here_from_its_tokens(pool: OwnPool) -> None:
    broken = ScriptedTarget("p/a", [[Began(), Content("hello "), Content("to"), fails(FailureKind.SERVER)]])
    async with gateway(broken, pool.target, midstream="continue").stream(hello(max_tokens=12)) as events:
        items = [item async for item in events]
    assert Continued("pool/echo", FailureKind.SERVER) in items
    prompt = pool.prefill.orders[0].request.prompt
    text = "<|im_start|>user\nhello to the world<|im_end|>\n<|im_start|>assistant\nhello to"
    assert pool.text(prompt) == text
    assert list(prompt) == pool.tokens(text)
    told = "".join(item.text for item in items if isinstance(item, Content))
    assert told == "hello to" + pool.text(prompt[:10], is_shown=True)  # two of the twelve tokens were elsewhere


async def test_the_reverse_is_refused_unless_the_route_wants_it(tmp_path: Path) -> None:
    """Other weights would end the sentence otherwise."""
    async with own_pool(tmp_path, roles={"d": D}) as pool:
        pool.decode.faults.error, pool.decode.faults.error_at = EngineError("it hurts"), 3
        other = ScriptedTarget("p/a", [[Began(), Content("."), Usage(), Ended("stop")]], continues="prefill")
        async with gateway(pool.target, other).stream(hello()) as events:
            with pytest.raises(AnswerBroken):
                await listen(events, [])
        async with gateway(pool.target, other, midstream="continue").stream(hello()) as events:
            items = [item async for item in events]
        assert items[-1] == Ended("stop")
        (request,) = other.requests
        assert request.template.continue_final
        assert request.messages[-1].role == "assistant"
        assert request.wanted_tokens == ("max_tokens", 5)


async def test_equal_weights_under_another_name_go_on_by_themselves(tmp_path: Path) -> None:
    """What was compared had the model's name in it, so that only a model and itself were ever equal."""
    async with own_pool(tmp_path) as pool:
        served = [dataclasses.replace(pool.served, name=name, weights=w) for name, w in (("b", "w_1"), ("c", "w_2"))]
        same, other = (PoolTarget(model, pool.rig.router) for model in served)
        own = PoolTarget(dataclasses.replace(pool.served, weights="w_1"), pool.rig.router)
        assert pool.served.fingerprint != served[0].fingerprint
        assert may_go_on(own, same, "auto")
        assert not may_go_on(own, other, "auto")
        assert not may_go_on(pool.target, PoolTarget(pool.served, pool.rig.router), "auto")  # nobody knows


async def test_strategies_see_what_a_pool_has_in_work_and_how_quick_it_is(tmp_path: Path) -> None:
    async with own_pool(tmp_path, step_s=0.002) as pool:
        other = ScriptedTarget("p/a", [[Began(), Content("a"), Usage(), Ended("stop")]])
        gate = gateway(other, pool.target, strategy="p2c")
        assert (await gate.answer(hello(), Context()))[0].message.content
        for _ in range(20):  # by chance each of the two is asked
            await gate.answer(hello())
        async with gateway(pool.target).stream(hello(max_tokens=900)) as events:
            async for _ in events:
                break
        seen = {one.target: one for one in gate.explain(hello()).candidates}
        slow, quick = seen["pool/echo"].latency_ms, seen["p/a"].latency_ms
        assert quick is not None
        assert slow is None or slow > quick
        sole = gateway(pool.target)
        async with sole.stream(hello(max_tokens=900)) as events:
            async for _ in events:
                break
            assert [one.in_flight for one in sole.explain(hello()).candidates] == [1]
        (after,) = sole.explain(hello()).candidates
        assert after.in_flight == 0
        assert after.latency_ms is not None


async def test_a_session_stays_at_its_target_and_weights_hold(pool: OwnPool) -> None:
    other = ScriptedTarget("p/a", [[Began(), Content("a"), Usage(), Ended("stop")]])

    async def answered_by(gate: Gateway, session: str = "") -> str:
        return (await gate.answer(hello(), Context(session=session)))[1].target

    sticky = gateway(pool.target, other, strategy="sticky")
    found = [{await answered_by(sticky, session) for _ in range(2)} for session in "abcdefgh"]
    assert all(len(targets) == 1 for targets in found)
    assert set().union(*found) == {"pool/echo", "p/a"}
    shares = [{"target": "pool/echo", "weight": 1000}, {"target": "p/a", "weight": 0.001}]
    weighted = gateway(pool.target, other, strategy="weighted", targets=shares)
    assert {await answered_by(weighted) for _ in range(4)} == {"pool/echo"}


async def test_no_client_of_a_route_notices_that_a_replica_is_lost(tmp_path: Path) -> None:
    """200 streams, each of which loses its decode engine at another place: the texts stay what they were."""
    chance = random.Random(20261123)
    roles = {"p": P, "d0": D, "d1": D, "d2": D}  # one of them may still be dialled again
    async with own_pool(tmp_path, roles=roles, retry_budget=1.0) as pool:
        engines = [pool.rig.engines[name] for name in ("d0", "d1", "d2")]
        gate = gateway(pool.target, timeouts={"idle_s": 10})
        moves = 0

        def spare_the_next() -> None:
            """Who gets the rest of an answer keeps its stream."""
            for engine in engines:
                if engine.orders and engine.orders[-1].request.resume:
                    engine.orders.clear()
                    for one in engines:
                        one.faults.drop_stream_at = None

        for engine in engines:
            engine.on_order = spare_the_next
        for number in range(DROPS):
            length = chance.randrange(8, 32)
            request = hello(max_tokens=length, ignore_eos=True, seed=number, temperature=number % 2)
            place = chance.randrange(1, length)
            for engine in engines:
                engine.faults.drop_stream_at = place
            prompt = pool.tokens("<|im_start|>user\nhello to the world<|im_end|>\n<|im_start|>assistant\n")
            wanted = pool.text([prompt[i % len(prompt)] for i in range(length)], is_shown=True)
            pieces: list[str] = []
            async with gate.stream(request) as events:
                async for item in events:
                    assert not isinstance(item, Continued)
                    if isinstance(item, Content):
                        pieces.append(item.text)
            assert "".join(pieces) == wanted, (number, place, length)
            assert [entry.outcome for entry in events.record.attempts] == ["answered"]
            assert events.record.usage.output_tokens == length
            moves += all(engine.faults.drop_stream_at is None for engine in engines)
        assert moves == DROPS
        assert pool.rig.metric("diptych_migrations_total") >= DROPS
