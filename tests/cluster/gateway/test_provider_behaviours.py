"""Whatever a provider does, in each of the five formats: the answer, another target's, or one honest error, in time and
for at most one further call per failure. All behaviours of scripted.py at once, over real connections.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from behaviours import BEHAVIOURS
from dialects import DIALECTS
from journeys import HELLO, text_of
from scripted import HALF, TEXT, Behaviour, Rig

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.public import AnswerBroken
from diptych.cluster.gateway.record import AttemptRecord, ExchangeRecord
from diptych.cluster.gateway.relay import Verbatim, as_events
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.signals import Continued, Restarted
from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.network import NameUnknown
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.errors import DiptychError
from diptych.protos.openai import parse_chat
from diptych.protos.replies import Ended

DEADLINE_S = 20.0
LENIENT = dict.fromkeys(("connect_s", "headers_s", "first_token_s", "idle_s", "answer_s"), 18) | {"total_s": DEADLINE_S}
# Of those that hang alone: what comes in time, comes in time on a busy machine too.
TIMEOUTS = {
    "": LENIENT,
    "first": LENIENT | {"first_token_s": 0.5, "headers_s": 0.5, "answer_s": 0.5},
    "later": LENIENT | {"idle_s": 2.0},
}
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}]
CODECS = [dialect.codec for dialect in DIALECTS]
QUICK = ("openai.chat", "bedrock.converse")  # text and binary streams
REST = tuple(codec for codec in CODECS if codec not in QUICK)
UNREACHED = {
    "gone": Behaviour(lambda wire: asyncio.sleep(0), "moves", "moves", "connect"),
    "nowhere": Behaviour(lambda wire: asyncio.sleep(0), "moves", "moves", "connect"),
}
ALL = {**BEHAVIOURS, **UNREACHED}
CASES = [
    (codec, name, mode)
    for codec in CODECS
    for name, behaviour in ALL.items()
    for mode in ("stream", "whole", "relay")
    if (not behaviour.only or codec in behaviour.only) and (mode != "relay" or codec == "openai.chat")
]


@dataclass
class Seen:
    """What a client saw of a case, and what the provider did."""

    text: str
    error: Exception | None
    has_end: bool
    seconds: float
    record: ExchangeRecord
    calls: int = 0


def test_there_are_more_than_sixty() -> None:
    """The exam asks for sixty."""
    assert len(BEHAVIOURS) >= 60


@pytest.fixture(scope="module", params=[QUICK, pytest.param(REST, marks=pytest.mark.slow)], ids=" ".join)
def seen(request: pytest.FixtureRequest) -> dict[tuple[str, str, str], Seen]:
    """All cases of some formats, at the same time."""
    found = asyncio.run(everything(request.param, ("stream", "whole")))
    if "openai.chat" in request.param:
        found |= asyncio.run(everything(request.param, ("relay",)))
    return found


async def everything(codecs: Sequence[str], modes: Sequence[str]) -> dict[tuple[str, str, str], Seen]:
    async with Rig() as rig:
        with socket.socket() as closed:  # bound, and does not listen: nobody else gets its port
            closed.bind(("127.0.0.1", 0))
            found = await asked_of(rig, closed.getsockname()[1], codecs, modes)
        async with asyncio.timeout(30):
            await rig.left.wait()
    return found


async def asked_of(
    rig: Rig, closed: int, codecs: Sequence[str], modes: Sequence[str]
) -> dict[tuple[str, str, str], Seen]:
    found: dict[tuple[str, str, str], Seen] = {}
    gateways = {mode: made(rig, closed) for mode in modes}  # a breaker that one mode opened is not the other's
    limit = asyncio.Semaphore(40)
    for hangs in TIMEOUTS:  # one kind after the other
        now = [case for case in CASES if ALL[case[1]].hangs == hangs and case[0] in codecs and case[2] in modes]
        told = await asyncio.gather(*(ask(gateways[case[2]], limit, *case) for case in now))
        found |= dict(zip(now, told, strict=True))
    for gateway in gateways.values():
        await gateway.aclose()
    for (codec, name, mode), case in found.items():
        case.calls = rig.calls[codec, name, "stream" if mode == "relay" else mode]
    return found


async def nobody(host: str, port: int) -> Sequence[str]:
    """A resolver that knows loopback alone."""
    if host == "127.0.0.1":
        return [host]
    raise NameUnknown(f"the name {host} has no address")


def made(rig: Rig, closed: int) -> Gateway:
    """A route for each behaviour in each format, with another model of the same provider behind it. Nobody listens on
    the port `closed`.
    """
    routes: dict[str, Any] = {}
    for codec in CODECS:
        routes[f"well-{codec}"] = {"targets": [f"rig-{codec}/well"], "timeouts": LENIENT}
        for name, behaviour in BEHAVIOURS.items():
            routes[f"{codec}-{name}"] = route(codec, f"rig-{codec}/{name}", TIMEOUTS[behaviour.hangs])
        for name in UNREACHED:
            routes[f"{codec}-{name}"] = route(codec, f"{name}-{codec}/any", LENIENT)
    providers = {name: ProviderSettings(**given) for name, given in rig.providers(closed).items()}
    clients = Clients(Registry.load(providers, {}, {}), resolve=nobody)
    return Gateway(GatewaySettings.model_validate({"routes": routes, "retry_floor": 10_000}), clients)


def route(codec: str, target: str, timeouts: dict[str, float]) -> dict[str, Any]:
    return {"targets": [target], "fallback": [f"well-{codec}"], "retries": 1, "timeouts": timeouts}


async def ask(gateway: Gateway, limit: asyncio.Semaphore, codec: str, name: str, mode: str) -> Seen:
    params: dict[str, Any] = {"tools": TOOLS} if ALL[name].has_tools else {}
    loop = asyncio.get_running_loop()
    async with limit:
        began = loop.time()
        if mode == "relay":
            return await ask_for_bytes(gateway, f"{codec}-{name}", params)
        stream = gateway.stream(f"{codec}-{name}", HELLO, max_tokens=99, **params)
        error: Exception | None = None
        items: list[Any] = []
        if mode == "stream":
            async with stream as events:
                try:
                    async for item in events:
                        items.append(item)
                except Exception as exc:
                    error = exc
            return Seen(text_of(items), error, has_end(items), loop.time() - began, stream.record)
        exchange = gateway._exchange(stream._plan, None)
        text = ""
        try:
            text = (await exchange.whole()).message.content
        except Exception as exc:
            error = exc
        return Seen(text, error, error is None, loop.time() - began, exchange.record)


async def ask_for_bytes(gateway: Gateway, model: str, params: dict[str, Any]) -> Seen:
    """As a client of OpenAI's format whose chunks are the provider's."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    body = {"model": model, "messages": HELLO, "max_tokens": 99, "stream": True, **params}
    error: Exception | None = None
    items: list[Any] = []
    answer = gateway.relay(parse_chat(json.dumps(body).encode()), Verbatim(body=body, id="ours", model=model))
    async with answer as found:
        try:
            async for item in found:
                items.append(item)
        except Exception as exc:
            error = exc
    text = text_of(list(as_events(item for item in items if not isinstance(item, Continued | Restarted))))
    return Seen(text, error, has_end(items), loop.time() - began, answer.record)


def has_end(items: Sequence[Any]) -> bool:
    return any(isinstance(item, Ended) for item in items)


@pytest.mark.parametrize("name", ALL)
def test_the_client_sees_what_the_table_says(seen: dict[tuple[str, str, str], Seen], name: str) -> None:
    """R20: no wrong text, no made-up end, no call too many, nothing over the deadline."""
    cases = [case for case in seen if case[1] == name]
    faults = [f"{case}: {fault}; {seen[case]}" for case in cases for fault in wrong(seen[case], ALL[name], case[2])]
    assert not faults, "\n".join(faults)
    formats = {case[0] for case in seen} & set(ALL[name].only or CODECS)
    assert len(cases) == 2 * len(formats) + ("openai.chat" in formats)


def wrong(case: Seen, behaviour: Behaviour, mode: str) -> list[str]:
    """What is not as it should be, in words."""
    outcome = behaviour.whole if mode == "whole" else behaviour.stream
    failures = case.record.failures
    checks = {
        "kind": {kind.value for kind in failures} <= set(behaviour.kind.split("|")),
        "attempts": len(case.record.attempts) <= len(failures) + 1,
        "calls": case.calls <= len(failures) + 1,
        "bills": len([entry for entry in case.record.attempts if may_be_billed(entry)]) <= 2,
        "deadline": case.seconds < DEADLINE_S,
        "end": case.has_end == (outcome in ("answers", "moves")),
    }
    match outcome:
        case "answers":
            checks |= {"text": case.text == TEXT, "error": case.error is None}
        case "moves":
            checks |= {"text": case.text == "another answer", "error": case.error is None}
        case "breaks":
            checks |= {"text": case.text in (HALF, TEXT), "error": isinstance(case.error, AnswerBroken)}
        case "refuses":
            refused = isinstance(case.error, DiptychError) and 400 <= case.error.http_status < 500
            checks |= {"text": case.text == "", "error": refused}
    return [f"{outcome}: wrong {what}" for what, is_right in checks.items() if not is_right]


def may_be_billed(attempt: AttemptRecord) -> bool:
    """Whether the provider had begun to answer, or was still at work when nobody waited any more."""
    late = attempt.failure is not None and attempt.failure.kind.value.startswith("timeout")
    return late or (attempt.http is not None and 200 <= attempt.http.status < 300)


def test_no_behaviour_made_a_defect(seen: dict[tuple[str, str, str], Seen]) -> None:
    """A codec's KeyError looks like a provider's failure from outside."""
    inside = [case for case, told in seen.items() if "inside this server" in str(told.record.told())]
    assert inside == []
