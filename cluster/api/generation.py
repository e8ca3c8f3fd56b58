"""The two generation endpoints: body to GenerateCall, tokens to one JSON answer or a stream of events.

chat.py and completions.py say what differs between them; this file is what they share. No status line is sent before
the first token, so that every earlier failure has its own HTTP status.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.router.router import Explanation, GenerateCall, Router, TokenDelta
from diptych.protos.errors import ContextTooLong, InvalidRequest, Overloaded, RequestTooLarge, UnknownModel
from diptych.protos.openai import GenerationRequest
from diptych.protos.openai_replies import JsonObject, usage
from diptych.protos.strict_json import printable
from diptych.protos.types import FinishReason, SamplingParams

from .body import header, read_body, refuse_body
from .errors import BodyTimeout, public
from .served import ServedModel
from .sse import DONE, EventEncoder, error_event
from .text import TextStream

INLINE_BODY_BYTES = 64 << 10  # larger bodies are parsed in a thread: the event loop stays free of long work
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Endpoint(Protocol):
    """What differs between chat and completions."""

    is_chat: bool
    id_prefix: str

    def parse(self, body: bytes) -> GenerationRequest:
        """The checked body. Raises InvalidRequest."""

    async def prompt(self, request: GenerationRequest, model: ServedModel, room: int) -> tuple[int, ...]:
        """Token ids; `room` is the context's size in tokens."""

    def max_tokens(self, request: GenerationRequest, default: int) -> int | None:
        """What the client asked for, or what the endpoint takes instead; None: `default`, cut to what fits."""

    def answer(
        self, *, id: str, created: int, model: str, text: str, finish_reason: str, use: JsonObject
    ) -> JsonObject:
        """The whole answer's body."""


@dataclass(slots=True)
class _Answer:
    """One answer on its way from tokens to text."""

    call: GenerateCall
    text: TextStream
    num_tokens: int = 0
    finish_reason: str = ""
    explanation: Explanation | None = None
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> JsonObject:
        assert self.explanation is not None
        return usage(len(self.call.prompt), self.num_tokens, self.explanation.cached_tokens)

    async def pieces(self, deltas: AsyncGenerator[TokenDelta, bool | None]) -> AsyncIterator[str]:
        """Text as it settles, possibly empty; after the last piece `finish_reason` and `explanation` are set."""
        stops = self.call.sampling.stop_token_ids
        delta = await anext(deltas)
        while delta.finish is None:
            self.num_tokens += len(delta.tokens)
            tokens = delta.tokens
            if tokens[-1] in stops:  # an end token ends the answer and is no text, special or not
                tokens = tokens[:-1]
            yield self.text.feed(tokens)
            delta = await deltas.asend(True) if self.text.stopped else await anext(deltas)
        self.explanation = delta.finish
        tail = "" if self.text.stopped else self.text.flush()
        ended = self.text.stopped or delta.finish.reason is FinishReason.STOP
        self.finish_reason = "stop" if ended else "length"
        if tail:
            yield tail


class GenerationApp:
    """The ASGI application of one endpoint."""

    def __init__(self, endpoint: Endpoint, router: Router, models: dict[str, ServedModel]) -> None:
        self._endpoint = endpoint
        self._router = router
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
            request, call = await self._prepare(body, header(scope, b"traceparent"))
        except (RequestTooLarge, BodyTimeout) as exc:
            await refuse_body(exc, receive, send)
            return
        except ClientDisconnect:
            return
        model = self._models[request.model]
        answer = _Answer(call, TextStream(model.renderer.table, request.stop))
        answer.id = self._endpoint.id_prefix + os.urandom(12).hex()
        reply = self._stream(request, answer, send) if request.stream else self._whole(request, answer, send)
        await until_disconnect(receive, reply)

    async def _prepare(self, body: bytes, traceparent: str) -> tuple[GenerationRequest, GenerateCall]:
        if len(body) <= INLINE_BODY_BYTES:
            request = self._endpoint.parse(body)
        else:
            request = await asyncio.to_thread(self._endpoint.parse, body)
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(sorted(self._models))
            raise UnknownModel(f"the model {printable(request.model)} is not served; there is: {known}", "model")
        engines = self._router.view.capacity_tokens(model.name)
        if engines is None:
            raise Overloaded(f"no engine of {model.name} is up", self._router.settings.connect_timeout_s)
        room = min(model.max_context_tokens, engines)
        prompt = await self._endpoint.prompt(request, model, room)
        max_tokens = self._max_tokens(request, len(prompt), room)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            seed=_seed(request.seed, model.seed),
            stop_token_ids=frozenset() if request.ignore_eos else model.eos_token_ids,
        )
        return request, GenerateCall(model=model.name, prompt=prompt, sampling=sampling, traceparent=traceparent)

    def _max_tokens(self, request: GenerationRequest, num_prompt: int, room: int) -> int:
        default = self._router.settings.default_max_tokens
        wanted = self._endpoint.max_tokens(request, default)
        if num_prompt + (1 if wanted is None else wanted) > room:
            asked = "" if wanted is None else f" and max_tokens asks for {wanted} more"
            raise ContextTooLong(
                f"this model's context holds {room} tokens; the prompt has {num_prompt}{asked}",
                "messages" if self._endpoint.is_chat else "prompt",
            )
        return min(default, room - num_prompt) if wanted is None else wanted

    async def _whole(self, request: GenerationRequest, answer: _Answer, send: Send) -> None:
        async with aclosing(self._router.generate(answer.call)) as deltas:
            text = "".join([piece async for piece in answer.pieces(deltas)])
        reply = self._endpoint.answer(
            id=answer.id,
            created=answer.created,
            model=request.model,
            text=text,
            finish_reason=answer.finish_reason,
            use=answer.usage(),
        )
        body = json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", answer.id.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream(self, request: GenerationRequest, answer: _Answer, send: Send) -> None:
        events = EventEncoder(
            chat=self._endpoint.is_chat,
            id=answer.id,
            created=answer.created,
            model=request.model,
            include_usage=request.include_usage,
        )
        start: dict[str, Any] = {"type": "http.response.start", "status": 200}
        start["headers"] = [*_SSE_HEADERS, (b"x-request-id", answer.id.encode())]
        lead = events.role()  # goes out with the first token's text, in one write
        is_started = False
        try:
            async with aclosing(self._router.generate(answer.call)) as deltas:
                async for piece in answer.pieces(deltas):
                    if not is_started:
                        is_started = True
                        await send(start)
                    if piece or lead:
                        data = lead + (events.text(piece) if piece else b"")
                        lead = b""
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            end = lead + events.finish(answer.finish_reason)
            if request.include_usage:
                end += events.usage(answer.usage())
            end += DONE
        except Exception as exc:
            if not is_started:
                raise
            end = error_event(public(exc))
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; when the client goes away first, cancel it and return once it has let go of everything."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _seed(wanted: int | None, default: int | None) -> int:
    seed = default if wanted is None else wanted
    return int.from_bytes(os.urandom(8)) if seed is None else seed & 0xFFFF_FFFF_FFFF_FFFF


def check_token_ids(prompt: tuple[int, ...], vocab_size: int) -> None:
    """Raises InvalidRequest when an id is outside the vocabulary."""
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise InvalidRequest(
            f"prompt holds the token id {printable(str(wrong), 24)}; this model's ids go from 0 to {vocab_size - 1}",
            "prompt",
        )
