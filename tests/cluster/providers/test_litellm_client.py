"""Providers that the library litellm reaches: what it is given, what it is not, how its answers and errors are read.

The library is a stand-in here; tests/clients has the real one. Guards against a client's fields that would change the
address or the key, an answer that broke off and counts as ended because the library makes a reason up, attempts that it
makes on its own, and its name in anybody's way who does not use it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.providers import registry as registries
from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.litellm_client import LitellmClient
from diptych.cluster.providers.metrics import ProviderMetrics
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.cluster.providers.terms import HttpExchange, Terms, Timeouts
from diptych.protos.errors import InvalidRequest, StartupError
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.replies import Reply, ReplyBuilder

KEY = "sk-watsonx-0123456789abcdef"
CHUNKS: list[dict[str, Any]] = [
    {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hel"}}]},
    {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"content": "lo"}}]},
    {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"id": "c", "model": "m", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
]
WHOLE = {
    "id": "c",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


class Answer:
    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return self._told

    def model_dump_json(self, **_: Any) -> str:
        return json.dumps(self._told)


class Chunks:
    """As the library's wrapper: an iterator that knows whether a reason to end was ever told."""

    def __init__(self, chunks: list[dict[str, Any]], finish: str | None = "stop", *, hangs: bool = False) -> None:
        self.received_finish_reason = finish
        self.is_closed = False
        self._hangs = hangs
        self._left = list(chunks)

    def __aiter__(self) -> AsyncIterator[Answer]:
        return self

    async def __anext__(self) -> Answer:
        if not self._left:
            if self._hangs:
                await asyncio.Event().wait()
            raise StopAsyncIteration
        return Answer(self._left.pop(0))

    async def aclose(self) -> None:
        self.is_closed = True


class Library(ModuleType):
    """A stand-in for litellm: `answer` is what its function gives, or raises."""

    def __init__(self) -> None:
        super().__init__("litellm")
        self.__spec__ = SimpleNamespace(name="litellm")  # type: ignore[assignment]
        self.asked: list[dict[str, Any]] = []
        self.answer: Any = Answer(WHOLE)

    async def acompletion(self, **arguments: Any) -> Any:
        self.asked.append(arguments)
        if isinstance(self.answer, Exception):
            raise self.answer
        if callable(self.answer):
            return await self.answer()
        return self.answer


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setitem(sys.modules, "litellm", made)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "")  # put back what the client sets
    monkeypatch.setenv("LITELLM_MODE", "")
    return made


def loaded(**more: Any) -> Registry:
    settings = {"codec": "litellm", "api_key": "env:LITE_KEY", **more}
    return Registry.load({"lite": ProviderSettings.model_validate(settings)}, {"LITE_KEY": KEY})


def a_request(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat(json.dumps(body).encode())


class Asked:
    """A client, and what it was told."""

    def __init__(self, registry: Registry) -> None:
        provider, self.model = registry.target("lite/watsonx/ibm/granite-3")
        self.numbers = CollectorRegistry()
        self.clients = Clients(registry, ProviderMetrics(self.numbers))
        self.provider = provider
        client = self.clients.of(provider)
        assert isinstance(client, LitellmClient)
        self.client = client
        self.exchange = HttpExchange()

    def outgoing(self, *, stream: bool, **fields: Any) -> Any:
        return self.client.codec.encode(
            a_request(**fields), model=self.model, stream=stream, quirks=self.provider.quirks
        )

    async def whole(self, **fields: Any) -> Reply:
        return await self.client.whole(
            self.outgoing(stream=False, **fields), Terms.within(Timeouts(answer_s=5)), self.exchange
        )

    async def streamed(self, timeouts: Timeouts = Timeouts()) -> Reply:  # noqa: B008
        builder = ReplyBuilder()
        async for event in self.client.stream(self.outgoing(stream=True), Terms.within(timeouts), self.exchange):
            builder.add(event)
        return builder.reply()

    def count(self, outcome: str) -> float:
        name = "diptych_provider_requests_total"
        return self.numbers.get_sample_value(name, {"provider": "lite", "outcome": outcome}) or 0.0


async def test_a_whole_answer(library: Library) -> None:
    """The model's name goes on as it is; no second attempts, no leaving out, no cache are the library's."""
    asked = Asked(loaded(base_url="https://lite.example.com/v1", headers={"x-team": "a"}))
    reply = await asked.whole(max_tokens=9)
    assert reply.message.content == "Hello"
    assert (reply.usage.input_tokens, reply.ended.finish) == (3, "stop")
    (given,) = library.asked
    assert 0 < given.pop("timeout") <= 5
    assert given == {
        "model": "watsonx/ibm/granite-3",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "api_key": KEY,
        "api_base": "https://lite.example.com/v1",
        "extra_headers": {"x-team": "a"},
        "max_retries": 0,
        "num_retries": 0,
        "drop_params": False,
        "caching": False,
    }
    assert asked.count("answered") == 1
    assert asked.exchange.ended_at is not None


async def test_a_stream(library: Library) -> None:
    library.answer = chunks = Chunks(CHUNKS)
    asked = Asked(loaded())
    reply = await asked.streamed()
    assert reply.message.content == "Hello"
    assert reply.usage.output_tokens == 2
    assert library.asked[0]["stream"] is True
    assert "api_base" not in library.asked[0]
    assert asked.exchange.first_token_at is not None
    assert not chunks.is_closed  # it is at its end


async def test_a_reason_to_end_that_the_library_made_up_is_none(library: Library) -> None:
    """It tells `stop` where the connection broke; only its own note says that nobody said so."""
    library.answer = Chunks(CHUNKS, finish=None)
    asked = Asked(loaded())
    with pytest.raises(ProviderFailure) as caught:
        await asked.streamed()
    assert (caught.value.failure.kind, caught.value.failure.code) == (FailureKind.SERVER, "cut")
    assert asked.count("failed") == 1


async def test_a_stream_that_is_left_is_closed(library: Library) -> None:
    library.answer = chunks = Chunks(CHUNKS)
    asked = Asked(loaded())
    events = asked.client.stream(asked.outgoing(stream=True), Terms.within(Timeouts()))
    await anext(events)
    await events.aclose()
    assert chunks.is_closed
    assert asked.count("left") == 1


@pytest.mark.parametrize(
    ("chunks", "timeouts", "kind"),
    [
        ([], Timeouts(first_token_s=0.01), FailureKind.FIRST_TOKEN_TIMEOUT),
        (CHUNKS[:1], Timeouts(idle_s=0.01), FailureKind.IDLE_TIMEOUT),
        (CHUNKS[:1], Timeouts(total_s=0.01), FailureKind.TOTAL_TIMEOUT),
    ],
)
async def test_waits_end(library: Library, chunks: Any, timeouts: Timeouts, kind: FailureKind) -> None:
    library.answer = waiting = Chunks(chunks, hangs=True)
    with pytest.raises(ProviderFailure) as caught:
        await Asked(loaded()).streamed(timeouts)
    assert caught.value.failure.kind is kind
    assert waiting.is_closed


def an_error(name: str, message: str, **fields: Any) -> Exception:
    return type(name, (Exception,), fields)(message)  # type: ignore[no-any-return]


def _unreached() -> Exception:
    found = an_error("InternalServerError", "Connection error.", status_code=500)
    found.__cause__ = an_error("ConnectError", "refused")
    return found


LIMITED = {"status_code": 429, "response": SimpleNamespace(headers={"Retry-After": "7"})}


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (an_error("ContextWindowExceededError", "too long", status_code=400), FailureKind.CONTEXT_LENGTH),
        (an_error("ContentPolicyViolationError", "no", status_code=400), FailureKind.CONTENT_POLICY),
        (an_error("UnsupportedParamsError", "top_k", status_code=400), FailureKind.UNSUPPORTED),
        (an_error("BadRequestError", "LLM Provider NOT provided.", status_code=400), FailureKind.NOT_FOUND),
        (an_error("BadRequestError", "nonsense", status_code=400), FailureKind.BAD_REQUEST),
        (an_error("AuthenticationError", "who?", status_code=401), FailureKind.AUTH),
        (an_error("RateLimitError", "slower", **LIMITED), FailureKind.RATE_LIMITED),
        (an_error("ServiceUnavailableError", "later", status_code=503), FailureKind.OVERLOADED),
        (an_error("InternalServerError", "oh", status_code=500), FailureKind.SERVER),
        (an_error("Timeout", "slow", status_code=408), FailureKind.FIRST_TOKEN_TIMEOUT),
        (_unreached(), FailureKind.CONNECT),
        (KeyError("a bug of theirs"), FailureKind.SERVER),
    ],
    ids=lambda found: type(found).__name__ if isinstance(found, Exception) else "",
)
async def test_errors_are_failures_of_their_kind(library: Library, exc: Exception, kind: FailureKind) -> None:
    library.answer = exc
    with pytest.raises(ProviderFailure) as caught:
        await Asked(loaded()).whole()
    assert caught.value.failure.kind is kind
    if kind is FailureKind.RATE_LIMITED:
        assert caught.value.failure.retry_after_s == 7
    if isinstance(exc, KeyError):
        assert "theirs" not in str(caught.value)


async def test_a_key_in_an_error_is_hidden(library: Library) -> None:
    """The library puts its arguments into messages; providers repeat keys."""
    library.answer = an_error("AuthenticationError", f"wrong key {KEY} for\nyou", status_code=401)
    with pytest.raises(ProviderFailure) as caught:
        await Asked(loaded()).whole()
    told = f"{caught.value} {caught.value.detail} {caught.value.failure!r}"
    assert "0123456789" not in told
    assert "\n" not in caught.value.failure.message


@pytest.mark.parametrize(
    "field", ["api_base", "base_url", "api_key", "custom_llm_provider", "mock_response", "fallbacks"]
)
async def test_a_clients_options_reach_no_address_and_no_key(library: Library, field: str) -> None:
    """All of them are arguments of one function there. Requests are refused before, where those are known by name; this
    is the second lock, for whatever the library's next version takes.
    """
    asked = Asked(loaded())
    outgoing = asked.outgoing(stream=False)
    outgoing.body[field] = "http://evil"
    with pytest.raises(ProviderFailure) as caught:
        await asked.client.whole(outgoing, Terms.within(Timeouts()))
    assert caught.value.failure.kind is FailureKind.UNSUPPORTED
    assert caught.value.failure.param == f"provider_options.{field}"
    assert not library.asked


@pytest.mark.parametrize(
    "model", ["huggingface/https://evil.test/v1", "huggingface//evil.test", "a/../b", "a?b=c", "a#b"]
)
async def test_a_models_name_is_no_address(library: Library, model: str) -> None:
    """Where clients may name models, `huggingface/https://...` sent the key of this process to any host."""
    asked = Asked(loaded())
    outgoing = asked.outgoing(stream=False)
    outgoing.body["model"] = model
    with pytest.raises(ProviderFailure, match="no model's name"):
        await asked.client.whole(outgoing, Terms.within(Timeouts()))
    assert not library.asked


async def test_it_is_a_target_like_others(library: Library) -> None:
    """By a route, and from one that fails to the next."""
    routes = {"chat": {"targets": ["lite/watsonx/m"]}}
    async with Gateway(GatewaySettings.model_validate({"routes": routes}), loaded()) as gateway:
        reply = await gateway.chat("chat", [{"role": "user", "content": "hi"}])
        assert reply.message.content == "Hello"
        library.answer = Chunks(CHUNKS)
        async with gateway.stream("chat", [{"role": "user", "content": "hi"}]) as events:
            async for _ in events:
                pass
        assert events.reply().message.content == "Hello"
        library.answer = an_error("BadRequestError", "nonsense", status_code=400)
        with pytest.raises(InvalidRequest):
            await gateway.chat("chat", [{"role": "user", "content": "hi"}])


def test_without_the_package_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start where a route names it, not by the first request."""

    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(registries, "find_spec", nothing)
    registry = loaded()
    with pytest.raises(StartupError, match=r"lite .*pip install 'diptych\[litellm\]'"):
        registry.check("lite/watsonx/m")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"proxy": "http://p:1"}, r"providers\.lite\.proxy: LiteLLM makes its connections itself"),
        ({"region": "eu-west-1"}, r"providers\.lite\.region"),
        ({"base_url": "http://api.example.com/v1"}, "plain http"),
    ],
)
def test_what_the_library_would_ignore_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        loaded(**settings)


def test_a_built_in_provider_needs_no_library() -> None:
    """`litellm` itself is one: the proxy, which speaks HTTP."""
    for name in ("litellm", "groq"):
        with pytest.raises(StartupError, match=rf"providers\.{name}\.codec: {name} is built in"):
            Registry.load({name: ProviderSettings(codec="litellm")}, {})


def test_nobody_pays_for_it_who_does_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes seconds; a configuration that names it is loaded without."""
    monkeypatch.setattr(registries, "find_spec", lambda name: name)
    Clients(loaded())
    assert "litellm" not in sys.modules
