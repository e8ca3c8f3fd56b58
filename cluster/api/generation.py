"""The two generation endpoints: body to GenerateCall, tokens to one JSON answer or a stream of events.

chat.py and completions.py say what differs between them; this file is what they share. No status line is sent before
the first token, so that every earlier failure has its own HTTP status.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.router.call import GenerateCall
from diptych.cluster.router.router import Router
from diptych.protos.errors import ContextTooLong, InvalidRequest, RequestTooLarge, UnknownModel
from diptych.protos.openai import GenerationRequest
from diptych.protos.openai_replies import JsonObject, usage
from diptych.protos.strict_json import printable
from diptych.protos.types import SamplingParams

from .access import tenant_of
from .answer import Choice, Piece, run
from .body import header, label, read_body, refuse_body
from .errors import BodyTimeout, public
from .logprobs import Entry
from .prepared import Prepared
from .reading import AnswerReader
from .sampling import of_choice, sampling_of
from .served import ServedModel
from .sse import DONE, EventEncoder, error_event
from .text import TextStream, TokenTable

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
    default_max_tokens: int | None  # where the client named none, cut to what fits; None: the router's default

    def parse(self, body: bytes) -> GenerationRequest:
        """The checked body. Raises InvalidRequest."""

    async def prepare(self, request: GenerationRequest, model: ServedModel, room: int) -> Prepared:
        """The prompts in token ids, `room` being the context's size, and what is known of the answers."""

    def max_tokens(self, request: GenerationRequest) -> tuple[str, int] | None:
        """The field by which the client asked for a number of tokens, and the number; None where it named none."""

    def logprobs(self, request: GenerationRequest) -> int | None:
        """Alternatives told with each generated token; None: no logprobs."""

    def prompt_logprobs(self, request: GenerationRequest) -> int | None:
        """The same for the prompt's tokens."""

    def echo(self, request: GenerationRequest, choice: Choice, table: TokenTable) -> Piece | None:
        """The prompt as the beginning of the answer, where the client wants that."""

    def shape_logprobs(self, entries: Sequence[Entry], table: TokenTable) -> JsonObject:
        """The `logprobs` of a choice."""

    def answer(self, answer: Answer, choices: list[Whole]) -> JsonObject:
        """The whole answer's body, but for what both endpoints have."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What all choices of one answer share."""

    request: GenerationRequest
    is_chat: bool
    model: ServedModel
    choices: list[Choice]
    prepared: Prepared
    id: str
    created: int

    def first_of(self, choice: Choice) -> Choice:
        """The first choice of the same prompt."""
        return self.choices[choice.index - choice.index % self.request.num_choices]

    def usage(self) -> JsonObject:
        """Each prompt once, the tokens of all choices; found in a cache is what the first of a prompt found there."""
        firsts = self.choices[:: self.request.num_choices]
        return usage(
            sum(len(first.call.prompt) for first in firsts),
            sum(choice.num_tokens for choice in self.choices),
            sum(first.explanation.cached_tokens for first in firsts if first.explanation is not None),
            sum(choice.reasoning_tokens for choice in self.choices) if self.is_chat else None,
        )

    def explanation(self) -> JsonObject | None:
        """How each choice was answered, if the client asked."""
        if not self.request.explain:
            return None
        told = [choice.explanation for choice in self.choices]
        return {"choices": [dataclasses.asdict(entry) for entry in told if entry is not None]}


@dataclass(frozen=True, slots=True)
class Whole:
    """A finished choice. `faults`: see Prepared.faults."""

    choice: Choice
    text: str
    logprobs: JsonObject | None
    faults: list[str]


class GenerationApp:
    """The ASGI application of one endpoint."""

    def __init__(self, endpoint: Endpoint, router: Router, models: dict[str, ServedModel]) -> None:
        self._endpoint = endpoint
        self._router = router
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        arrived_at = self._router.clock()  # the head is here; body, template and tokenizer take of the request's time
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
            answer = await self._prepare(body, scope, arrived_at)
        except (RequestTooLarge, BodyTimeout) as exc:
            await refuse_body(exc, receive, send)
            return
        except ClientDisconnect:
            return
        reply = self._stream(answer, send) if answer.request.stream else self._whole(answer, send)
        try:
            await until_disconnect(receive, reply)
        except InvalidRequest as exc:
            raise answer.prepared.blamed(exc) from exc

    async def _prepare(self, body: bytes, scope: Scope, arrived_at: float) -> Answer:
        tenant, session = tenant_of(scope), label(scope, "x-session-id")
        if len(body) <= INLINE_BODY_BYTES:
            request = self._endpoint.parse(body)
        else:
            request = await asyncio.to_thread(self._endpoint.parse, body)
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(sorted(self._models))
            raise UnknownModel(f"the model {printable(request.model)} is not served; there is: {known}", "model")
        room = min(model.max_context_tokens, self._router.view.capacity_tokens(model.name) or model.max_context_tokens)
        choices: list[Choice] = []
        prepared = await self._endpoint.prepare(request, model, room)
        for prompt in prepared.prompts:
            max_tokens = self._max_tokens(request, len(prompt), room)
            call = GenerateCall(
                model=model.name,
                prompt=prompt,
                sampling=await self._sampling(request, model, prompt, max_tokens),
                salt=tenant.encode(),
                timeout_s=request.timeout_s,
                arrived_at=arrived_at,
                traceparent=header(scope, b"traceparent"),
                priority=request.priority or 0,
                tenant=tenant,
                session=session,
                constraint=prepared.constraint,
            )
            for place in range(request.num_choices):
                choice = _choice(len(choices), place, request, model, call, is_scoring=max_tokens == 0)
                if prepared.reading is not None:
                    choice.reader = AnswerReader(prepared.reading)
                    choice.text = _text_stream(request, model, call, is_marked=True)
                choices.append(choice)
        answer_id = self._endpoint.id_prefix + os.urandom(12).hex()
        return Answer(request, self._endpoint.is_chat, model, choices, prepared, answer_id, int(time.time()))

    async def _sampling(
        self, request: GenerationRequest, model: ServedModel, prompt: tuple[int, ...], max_tokens: int
    ) -> SamplingParams:
        return await sampling_of(
            request,
            model,
            prompt,
            max_tokens=max(max_tokens, 1),
            logprobs=self._endpoint.logprobs(request),
            prompt_logprobs=self._endpoint.prompt_logprobs(request),
        )

    def _max_tokens(self, request: GenerationRequest, num_prompt: int, room: int) -> int:
        left = room - num_prompt
        if left < 1:
            raise ContextTooLong(
                f"this model's context holds {room} tokens; the prompt has {num_prompt} and leaves no room",
                "messages" if self._endpoint.is_chat else "prompt",
            )
        asked = self._endpoint.max_tokens(request)
        if asked is None:
            return min(self._endpoint.default_max_tokens or self._router.settings.default_max_tokens, left)
        name, wanted = asked
        if wanted > left:
            raise ContextTooLong(
                f"this model's context holds {room} tokens; the prompt has {num_prompt} and "
                f"{name} asks for {wanted} more, of which at most {left} fit",
                name,
            )
        return wanted

    async def _whole(self, answer: Answer, send: Send) -> None:
        texts: list[list[str]] = [[] for _ in answer.choices]
        entries: list[list[Entry]] = [[] for _ in answer.choices]
        async with aclosing(run(self._router, answer.choices)) as events:
            async for choice, piece in events:
                if piece is not None:
                    texts[choice.index].append(piece.text)
                    entries[choice.index].extend(piece.entries)
                    choice.read(piece)
        whole = []
        for choice in answer.choices:
            echoed, text = self._echo(answer, choice), "".join(texts[choice.index])
            told = [*echoed.entries, *_moved(entries[choice.index], choice.echoed)]
            if choice.reader is not None:
                choice.reader.finish()
            faults = self._faults(answer, choice, text)
            whole.append(Whole(choice, echoed.text + text, self._logprobs(answer, told), faults))
        reply = self._endpoint.answer(answer, whole)
        if (explanation := answer.explanation()) is not None:
            reply["diptych"] = explanation
        body = json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", answer.id.encode()),
            *answer.prepared.headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _echo(self, answer: Answer, choice: Choice) -> Piece:
        choice.prompt_logprobs = answer.first_of(choice).prompt_logprobs
        piece = self._endpoint.echo(answer.request, choice, answer.model.renderer.table) or Piece("")
        choice.echoed = len(piece.text)
        return piece

    def _logprobs(self, answer: Answer, entries: Sequence[Entry]) -> JsonObject | None:
        if self._endpoint.logprobs(answer.request) is None:
            return None
        return self._endpoint.shape_logprobs(entries, answer.model.renderer.table)

    async def _stream(self, answer: Answer, send: Send) -> None:
        start: dict[str, Any] = {"type": "http.response.start", "status": 200}
        start["headers"] = [*_SSE_HEADERS, (b"x-request-id", answer.id.encode()), *answer.prepared.headers]
        encoders = [self._encoder(answer, choice.index) for choice in answer.choices]
        leads = [encoder.role() for encoder in encoders]  # each goes out with its choice's first text, in one write
        seen: set[int] = set()
        texts: list[list[str]] = [[] for _ in answer.choices]  # of answers that are checked
        try:
            async with aclosing(run(self._router, answer.choices)) as events:
                async for choice, piece in events:
                    if not seen:
                        await send(start)
                    i, data = choice.index, b""
                    if i not in seen:
                        seen.add(i)
                        data = leads[i] + self._encoded(answer, encoders[i], self._echo(answer, choice), None)
                    if piece is None:
                        data += self._end(answer, choice, encoders[i], "".join(texts[i]))
                    else:
                        if answer.prepared.checks is not None:
                            texts[i].append(piece.text)
                        data += self._encoded(answer, encoders[i], piece, choice)
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            end = b""
            use = answer.usage() if answer.request.include_usage else None
            explanation = answer.explanation()
            if use is not None or explanation is not None:
                end = encoders[0].end(use, explanation)
            end += DONE
        except Exception as exc:
            if not seen:
                raise
            end = error_event(public(answer.prepared.blamed(exc) if isinstance(exc, InvalidRequest) else exc))
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _encoder(self, answer: Answer, index: int) -> EventEncoder:
        return EventEncoder(
            chat=self._endpoint.is_chat,
            id=answer.id,
            created=answer.created,
            model=answer.request.model,
            fingerprint=answer.model.fingerprint,
            include_usage=answer.request.include_usage,
            index=index,
        )

    def _encoded(self, answer: Answer, encoder: EventEncoder, piece: Piece, choice: Choice | None) -> bytes:
        """`choice` None: the piece is no part of its answer."""
        moved = _moved(piece.entries, choice.echoed) if choice is not None else piece.entries
        logprobs = self._logprobs(answer, moved) if moved else None
        if choice is not None and choice.reader is not None:
            return encoder.deltas(choice.read(piece), logprobs)
        return encoder.text(piece.text, logprobs) if piece.text or logprobs else b""

    def _end(self, answer: Answer, choice: Choice, encoder: EventEncoder, text: str) -> bytes:
        """What the end of a choice settles, and the chunk that tells why it ended."""
        reader = choice.reader
        if reader is None:
            return encoder.finish(choice.finish_reason, self._faults(answer, choice, text))
        data = encoder.deltas(reader.finish(), None)
        return data + encoder.finish(reader.finish_reason(choice.finish_reason), self._faults(answer, choice, text))

    def _faults(self, answer: Answer, choice: Choice, text: str) -> list[str]:
        """How a complete answer fails its form: the engines' grammar cannot express all of every schema."""
        if choice.finish_reason != "stop" or choice.text.stopped:
            return []
        faults = answer.prepared.faults(choice.reader, text)
        if faults:
            self._router.metrics.counters["answers_out_of_form"].labels(model=answer.model.name).inc()
        return faults


def _choice(
    index: int, place: int, request: GenerationRequest, model: ServedModel, call: GenerateCall, *, is_scoring: bool
) -> Choice:
    return Choice(
        index=index,
        call=dataclasses.replace(call, sampling=of_choice(call.sampling, place)),
        text=_text_stream(request, model, call, is_marked=False),
        leads=place == 0,
        keep_end=request.include_stop_str_in_output is True,
        is_scoring=is_scoring,
    )


def _text_stream(request: GenerationRequest, model: ServedModel, call: GenerateCall, *, is_marked: bool) -> TextStream:
    """`is_marked`: the markers of the model's format are part of the text, special tokens or not."""
    return TextStream(
        model.marked_table if is_marked else model.renderer.table,
        request.stop,
        prompt=call.prompt,
        include_stop=request.include_stop_str_in_output is True,
        min_tokens=call.sampling.min_tokens,
    )


def _moved(entries: Sequence[Entry], by: int) -> Sequence[Entry]:
    """What follows an echoed prompt counts its characters too."""
    return [Entry(entry.token, entry.logprobs, entry.offset + by) for entry in entries] if by else entries


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
