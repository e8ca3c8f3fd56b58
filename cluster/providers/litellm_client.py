"""A provider that is reached through the library litellm, for services that have no codec here. An extra: the library
is loaded, in seconds of CPU, by the first request that needs it and never before.

clients.py makes these for providers with `codec: litellm`. Requests and answers are in OpenAI's chat format, as for any
provider that speaks it; keys, addresses and connections are the library's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncGenerator, Callable
from importlib import import_module
from typing import Any, Final

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.providers.codec import Codec, Outgoing, ServerEvent
from diptych.protos.providers.codecs import by_name
from diptych.protos.replies import Began, Ended, Event, Reply, Usage

from .auth import KeyAuth, needs_litellm, refused
from .litellm_failures import failure_of
from .metrics import Counts
from .network_failures import failed, one_line, too_late
from .provider import Provider
from .secrets import KeyReader, redacted
from .terms import HttpExchange, Terms

logger = logging.getLogger(__name__)
# What may be passed on. LiteLLM takes addresses, keys and made up answers as arguments of the same call: a client's
# `provider_options` must not reach those.
_FIELDS: Final = frozenset(
    "messages stream stream_options temperature top_p top_k min_p repetition_penalty presence_penalty "
    "frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens stop seed n user "
    "safety_identifier prompt_cache_key response_format tools tool_choice parallel_tool_calls functions function_call "
    "reasoning_effort thinking verbosity modalities audio prediction service_tier web_search_options".split()
)
# Of some providers' models the library takes the name for the address to which the key goes.
_MODEL: Final = re.compile(r"(?!.*//)[A-Za-z0-9@._:/+-]+")


class LitellmClient:
    """For any number of requests at once, as ProviderClient is. It does not relay bytes: the library parses them."""

    def __init__(self, provider: Provider, keys: KeyReader, counts: Callable[[Callable[[], int]], Counts]) -> None:
        self.provider = provider
        self.codec: Codec = by_name(provider.codec)
        self._auth = KeyAuth(provider, keys)
        self._counts = counts(lambda: 0)
        quirks = provider.quirks
        own = {*quirks.rename.values(), *quirks.extra_body, (quirks.effort_field or "").partition(".")[0]}
        self._fields = _FIELDS | own

    @property
    def num_connections(self) -> int:
        """Not known: they are the library's."""
        return 0

    def key_id(self) -> str:
        """Another text for another key, which tells nothing about it; empty where there is none."""
        return self._auth.key_id()

    async def close(self) -> None:
        """Nothing: the library keeps its connections for the process."""

    async def whole(self, outgoing: Outgoing, terms: Terms, exchange: HttpExchange | None = None) -> Reply:
        """The answer to a request that asks for a whole one. Raises ProviderFailure."""
        call = _Call(self, terms, exchange)
        try:
            answer = await call.made(outgoing, is_stream=False)
            reply = self.codec.reply(call.plain(answer), self.provider.quirks)
            call.outcome = "answered"
            return reply
        except ProviderFailure as exc:
            raise call.told(exc) from None
        finally:
            await call.end()

    async def stream(
        self, outgoing: Outgoing, terms: Terms, exchange: HttpExchange | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of the answer to a request that asks for a stream. Raises ProviderFailure. Closing it closes the
        connection.
        """
        call = _Call(self, terms, exchange)
        try:
            await call.made(outgoing, is_stream=True)
            decoder = self.codec.decoder(self.provider.quirks)
            while (chunk := await call.next()) is not None:
                for event in decoder.feed(ServerEvent(chunk)):
                    call.tell(event)
                    yield event
            for event in decoder.finish():
                yield event
            call.outcome = "answered"
        except ProviderFailure as exc:
            raise call.told(exc) from None
        finally:
            await call.end()

    def arguments(self, outgoing: Outgoing) -> dict[str, Any]:
        """Of the library's function. Raises ProviderFailure: no key, a field that it may not be given."""
        provider, model = self.provider, str(outgoing.body["model"])
        if not _MODEL.fullmatch(model) or ".." in model:
            words = f"{provider.name}: {one_line(model)[:64]!r} is no model's name: it may hold no address"
            raise failed(FailureKind.BAD_REQUEST, words, "path")
        if wrong := sorted(name for name in outgoing.body if name != "model" and name not in self._fields):
            words = f"{provider.name}: {', '.join(wrong)} cannot be passed on through LiteLLM: leave it out"
            raise ProviderFailure(
                Failure(kind=FailureKind.UNSUPPORTED, message=words, param=f"provider_options.{wrong[0]}")
            )
        secret = self._auth.secret()
        given = {
            "api_key": secret.reveal() if secret is not None else None,
            "api_base": provider.base_url or None,
            "extra_headers": dict(provider.headers) or None,
        }
        # Another attempt, leaving things out and answers of before are decided here, not there.
        return {
            **outgoing.body,
            **{name: value for name, value in given.items() if value is not None},
            "max_retries": 0,
            "num_retries": 0,
            "drop_params": False,
            "caching": False,
        }


class _Call:
    """One request on its way through the library, and its end."""

    def __init__(self, client: LitellmClient, terms: Terms, exchange: HttpExchange | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.exchange = exchange if exchange is not None else HttpExchange()
        self.outcome = "left"
        self._client = client
        self._terms = terms
        self._is_stream = False
        self._chunks: Any = None
        self._last_at = 0.0

    async def made(self, outgoing: Outgoing, *, is_stream: bool) -> Any:
        """The library's answer, or the beginning of its stream."""
        name, timeouts = self._client.provider.name, self._terms.timeouts
        arguments = self._client.arguments(outgoing)
        litellm = await _library(name)
        self._is_stream = is_stream
        self.exchange.began_at = self._last_at = began_at = self.loop.time()
        limit_s = min(timeouts.headers_s, timeouts.first_token_s) if is_stream else timeouts.answer_s
        end = min(self._terms.deadline, began_at + limit_s)
        answer = await self._within(end, litellm.acompletion(**arguments, timeout=max(end - began_at, 0.001)))
        self.exchange.headers_at = self._last_at = self.loop.time()
        self.exchange.status = 200
        if is_stream:
            self._chunks = answer
        return answer

    async def next(self) -> str | None:
        """The next chunk of the stream as JSON; None at its end. Raises ProviderFailure where the provider never said
        why it ended: the library makes a reason up.
        """
        timeouts, exchange = self._terms.timeouts, self.exchange
        end = min(self._terms.deadline, self._last_at + timeouts.idle_s)
        if exchange.first_token_at is None and exchange.began_at is not None:
            end = min(end, exchange.began_at + timeouts.first_token_s)
        try:
            chunk = await self._within(end, anext(self._chunks))
        except StopAsyncIteration:
            if getattr(self._chunks, "received_finish_reason", "told") is None:
                raise failed(FailureKind.SERVER, f"{self._client.provider.name} broke its answer off", "cut") from None
            return None
        self._last_at = self.loop.time()
        text = chunk.model_dump_json(exclude_none=True)
        exchange.bytes_in += len(text)
        return str(text)

    def plain(self, answer: Any) -> dict[str, Any]:
        """The library's object as the JSON that it stands for. Raises ProviderFailure."""
        found = answer.model_dump(mode="json", exclude_none=True)
        if not isinstance(found, dict):
            raise failed(FailureKind.SERVER, f"{self._client.provider.name} sent an answer that is none", "malformed")
        return found

    async def _within(self, end: float, work: Any) -> Any:
        name = self._client.provider.name
        try:
            async with asyncio.timeout_at(end):
                return await work
        except TimeoutError:
            raise too_late(name, self._terms, self.loop.time(), self.exchange, is_stream=self._is_stream) from None
        except StopAsyncIteration:
            raise
        except Exception as exc:  # the library lets through whatever its providers' code raises
            found = failure_of(exc, name, self._client.codec)
            if found.failure.code == "unreadable":
                logger.warning("litellm raised %s for %s", type(exc).__name__, name)
            if exc.__class__.__name__ == "Timeout":
                found = too_late(name, self._terms, self.loop.time(), self.exchange, is_stream=self._is_stream)
            raise found from None

    def tell(self, event: Event) -> None:
        """The caller is about to get `event`."""
        if self.exchange.first_token_at is None and not isinstance(event, Began | Usage | Ended):
            self.exchange.first_token_at = self.loop.time()

    def told(self, exc: ProviderFailure) -> ProviderFailure:
        """The failure as others may read it: without keys, on one line."""
        client, failure = self._client, exc.failure
        self.outcome = "failed"
        client._counts.failed(failure.kind.value)
        try:
            secret = client._auth.try_secret()
        except ProviderFailure:
            secret = None
        secrets = () if secret is None else (secret,)
        clean = Failure(
            kind=failure.kind,
            message=one_line(redacted(failure.message, secrets)),
            status=failure.status,
            retry_after_s=failure.retry_after_s,
            param=one_line(redacted(failure.param, secrets)),
            code=one_line(redacted(failure.code, secrets)),
        )
        detail = one_line(redacted(f"through litellm: {exc.detail}", secrets))
        return ProviderFailure(clean, exc.target or client.provider.name, detail)

    async def end(self) -> None:
        """Closes what is open, and counts."""
        counts, exchange = self._client._counts, self.exchange
        exchange.ended_at = self.loop.time()
        counts.outcomes[self.outcome].inc()
        counts.bytes_in.inc(exchange.bytes_in)
        close = getattr(self._chunks, "aclose", None)
        if close is not None and self.outcome != "answered":
            try:
                await close()
            except Exception as exc:  # of an answer that nobody reads any more
                logger.debug("litellm raised %s while closing a stream", type(exc).__name__)


async def _library(name: str) -> Any:
    """The module, told to ask nobody while it is loaded and tell nobody of requests. Raises ProviderFailure (AUTH)."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it fetches a table of prices
    os.environ.setdefault("LITELLM_MODE", "PRODUCTION")  # or it takes variables from a file .env of the working folder
    try:
        litellm = await asyncio.to_thread(import_module, "litellm")
    except ImportError as exc:
        raise refused(needs_litellm(name, f" ({exc})" if exc.name != "litellm" else "")) from None
    litellm.telemetry = False  # type: ignore[attr-defined]
    litellm.suppress_debug_info = True  # type: ignore[attr-defined]
    return litellm
