"""A checked request on its way to an own model's answer: body to GenerateCall, tokens to one JSON answer or the bytes
of a stream.

Generator knows no connection: answering.py uses it for HTTP endpoints, batches and stored responses, pool_target.py for
the gateway. No status line is sent before the first token, so that every earlier failure has its own HTTP status.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.types import Receive, Scope

from diptych.cluster.keys import Key
from diptych.cluster.router.call import GenerateCall
from diptych.cluster.router.registry import TrackedRequest
from diptych.cluster.router.router import Router
from diptych.protos.deltas import Content
from diptych.protos.errors import ContextTooLong, InvalidRequest, UnknownModel
from diptych.protos.openai import GenerationRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.strict_json import printable
from diptych.protos.types import SamplingParams
from diptych.protos.wire_checks import compact, compact_in_pieces, may_fit

from .access import caller_of, most_urgent_of, tenant_of
from .answer import Answer, Choice, Piece, run
from .body import header, label
from .endpoint import Endpoint, StreamEncoder, Whole
from .errors import public
from .logprobs import Entry, prompt_logprobs
from .reading import AnswerReader, Said
from .sampling import of_choice, sampling_of
from .served import ServedModel
from .text import TextStream

# Larger bodies are parsed, and answers shaped and written, in a thread: the event loop stays free of long work.
INLINE_BODY_BYTES = 8 << 10
INLINE_LOGPROBS = 1000
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Who asks, and since when. `arrived_at` on the router's clock."""

    tenant: str
    session: str = ""
    traceparent: str = ""
    arrived_at: float
    tracked: TrackedRequest | None = None  # the request that clients may ask about; its id is the answer's
    most_urgent: int | None = None  # the lowest priority that it may ask for
    key: Key | None = None  # that opened
    headers: Sequence[tuple[bytes, bytes]] = ()  # as they came, for overrides.py

    def priority(self, asked: int | None) -> int:
        """What a request gets. Raises InvalidRequest for more than its tenant may: others would wait behind it."""
        if asked is not None and self.most_urgent is not None and asked < self.most_urgent:
            raise InvalidRequest(
                f"priority is {asked}, and this tenant may ask for {self.most_urgent} and more, where lower is sooner "
                "(router.tenants, most_urgent)",
                "priority",
            )
        return asked or 0

    @classmethod
    def of(cls, scope: Scope, tracked: TrackedRequest) -> Origin:
        """Of an HTTP request. Raises InvalidRequest for a header that names nothing."""
        return cls(
            tenant=tenant_of(scope),
            session=label(scope, "x-session-id"),
            traceparent=header(scope, b"traceparent"),
            arrived_at=tracked.born,
            tracked=tracked,
            most_urgent=most_urgent_of(scope),
            key=caller_of(scope),
            headers=scope["headers"],
        )


class Generator:
    """Answers of own models in the form of one endpoint, without a connection."""

    def __init__(self, endpoint: Endpoint, router: Router, models: dict[str, ServedModel]) -> None:
        self.endpoint = endpoint
        self.router = router
        self._models = models

    async def parse(self, body: bytes) -> GenerationRequest:
        """The checked body; a large one is looked at in a thread. Raises InvalidRequest."""
        if len(body) <= INLINE_BODY_BYTES:
            return self.endpoint.parse(body)
        return await asyncio.to_thread(self.endpoint.parse, body)

    async def prepare(self, request: GenerationRequest, origin: Origin) -> Answer:
        """The answer to be, of which nothing was begun. Raises RequestError."""
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(sorted(self._models))
            raise UnknownModel(f"the model {printable(request.model)} is not served; there is: {known}", "model")
        room = min(model.max_context_tokens, self.router.view.capacity_tokens(model.name) or model.max_context_tokens)
        priority = origin.priority(request.priority)
        self.router.check_room(model.name, origin.tenant, priority)
        choices: list[Choice] = []
        prepared = await self.endpoint.prepare(request, model, room)
        for prompt in prepared.prompts:
            max_tokens, is_cut = self._max_tokens(request, len(prompt), room)
            call = GenerateCall(
                model=model.name,
                prompt=prompt,
                sampling=await self._sampling(request, model, prompt, max_tokens),
                salt=origin.tenant.encode(),
                timeout_s=request.timeout_s,
                first_token_timeout_s=request.first_token_timeout_s,
                arrived_at=origin.arrived_at,
                traceparent=origin.traceparent,
                priority=priority,
                tenant=origin.tenant,
                session=origin.session or session_of(request.prompt_cache_key),
                constraint=prepared.constraint,
                tracked=origin.tracked,
            )
            for place in range(request.num_choices):
                choice = _choice(len(choices), place, request, model, call, is_scoring=max_tokens == 0)
                choice.is_cut = is_cut
                if prepared.reading is not None:
                    choice.reader = AnswerReader(prepared.reading)
                    choice.text = _text_stream(request, model, call, is_marked=True)
                choices.append(choice)
        answer_id = origin.tracked.id if origin.tracked else self.endpoint.id_prefix + os.urandom(12).hex()
        is_chat, created = self.endpoint.is_chat, int(time.time())
        return Answer(request, is_chat, model, choices, prepared, answer_id, created, origin.tenant)

    async def _sampling(
        self, request: GenerationRequest, model: ServedModel, prompt: tuple[int, ...], max_tokens: int
    ) -> SamplingParams:
        return await sampling_of(
            request,
            model,
            prompt,
            max_tokens=max(max_tokens, 1),
            logprobs=self.endpoint.logprobs(request),
            prompt_logprobs=self.endpoint.prompt_logprobs(request),
        )

    def _max_tokens(self, request: GenerationRequest, num_prompt: int, room: int) -> tuple[int, bool]:
        """And whether that is less than was asked for."""
        left = room - num_prompt
        if left < 1:
            raise ContextTooLong(
                f"this model's context holds {room} tokens; the prompt has {num_prompt} and leaves no room",
                "messages" if self.endpoint.is_chat else "prompt",
            )
        asked = self.endpoint.max_tokens(request)
        if asked is None:
            return min(self.endpoint.default_max_tokens or self.router.settings.default_max_tokens, left), False
        name, wanted = asked
        if request.cuts_to_fit:
            return min(wanted, left), left < wanted
        if wanted > left:
            raise ContextTooLong(
                f"this model's context holds {room} tokens; the prompt has {num_prompt} and "
                f"{name} asks for {wanted} more, of which at most {left} fit",
                name,
            )
        return wanted, False

    async def whole(self, answer: Answer) -> JsonObject:
        """The body of the whole answer. Raises what ended it."""
        said: list[list[Said]] = [[] for _ in answer.choices]
        entries: list[list[Entry]] = [[] for _ in answer.choices]
        try:
            async with aclosing(run(self.router, answer.choices)) as events:
                async for choice, piece in events:
                    if piece is not None:
                        entries[choice.index].extend(piece.entries)
                        said[choice.index].extend(choice.read(piece))
        except InvalidRequest as exc:
            raise answer.prepared.blamed(exc) from exc
        faults = []
        for choice in answer.choices:
            if choice.reader is not None:
                said[choice.index].extend(choice.reader.finish())
            faults.append(await self._faults(answer, choice, _text_of(said[choice.index])))
        shape = partial(self._shaped, answer, said, entries, faults)
        is_small = self._num_logprobs(answer, entries) <= INLINE_LOGPROBS
        return shape() if is_small else await asyncio.to_thread(shape)

    def _num_logprobs(self, answer: Answer, entries: Sequence[Sequence[Entry]]) -> int:
        top, prompt_top = self.endpoint.logprobs(answer.request), self.endpoint.prompt_logprobs(answer.request)
        number = 0 if top is None else (1 + top) * sum(map(len, entries))
        return number + (0 if prompt_top is None else (1 + prompt_top) * answer.prompt_tokens)

    def _shaped(
        self,
        answer: Answer,
        said: Sequence[Sequence[Said]],
        entries: Sequence[Sequence[Entry]],
        faults: Sequence[list[str]],
    ) -> JsonObject:
        whole = []
        for choice in answer.choices:
            echoed, i = self._echo(answer, choice), choice.index
            told = [*echoed.entries, *_moved(entries[i], choice.echoed)]
            all_said = [Content(echoed.text), *said[i]] if echoed.text else said[i]
            of_prompt = None if i and self.endpoint.is_chat else _of_prompt(answer, choice)
            whole.append(Whole(choice, all_said, self._logprobs(answer, told), faults[i], of_prompt))
        reply = self.endpoint.answer(answer, whole)
        if (explanation := answer.explanation()) is not None:
            reply["diptych"] = explanation
        return reply

    async def stream(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The answer's events, encoded, the last of which ends it. Raises what ended it before its first one; a later
        failure is the last event.
        """
        encoders = [self.endpoint.encoder(answer, choice.index) for choice in answer.choices]
        leads = [encoder.begin() for encoder in encoders]  # each goes out with its choice's first text, in one write
        seen: set[int] = set()
        texts: list[list[str]] = [[] for _ in answer.choices]  # of answers that are checked
        try:
            async with aclosing(run(self.router, answer.choices)) as events:
                async for choice, piece in events:
                    i, data = choice.index, b""
                    if i not in seen:
                        seen.add(i)
                        data = leads[i] + self._encoded(answer, encoders[i], self._echo(answer, choice), None)
                    if piece is None:
                        data += await self._end(answer, choice, encoders[i], "".join(texts[i]))
                    else:
                        if answer.prepared.checks is not None:
                            texts[i].append(piece.text)
                        data += self._encoded(answer, encoders[i], piece, choice)
                    if data:
                        yield data
            end = self.endpoint.end(answer)
        except Exception as exc:
            told = answer.prepared.blamed(exc) if isinstance(exc, InvalidRequest) else exc
            if not seen:
                raise told from exc
            end = self.endpoint.failed(answer, public(told))
        yield end

    def _echo(self, answer: Answer, choice: Choice) -> Piece:
        choice.prompt_logprobs = answer.first_of(choice).prompt_logprobs
        piece = self.endpoint.echo(answer.request, choice, answer.model.renderer.table) or Piece("")
        choice.echoed = len(piece.text)
        return piece

    def _logprobs(self, answer: Answer, entries: Sequence[Entry]) -> JsonObject | None:
        if self.endpoint.logprobs(answer.request) is None:
            return None
        return self.endpoint.shape_logprobs(entries, answer.model.renderer.table)

    def _encoded(self, answer: Answer, encoder: StreamEncoder, piece: Piece, choice: Choice | None) -> bytes:
        """`choice` None: the piece is no part of its answer."""
        moved = _moved(piece.entries, choice.echoed) if choice is not None else piece.entries
        logprobs = self._logprobs(answer, moved) if moved else None
        if choice is not None and choice.reader is not None:
            return encoder.said(choice.read(piece), logprobs)
        return encoder.text(piece.text, logprobs) if piece.text or logprobs else b""

    async def _end(self, answer: Answer, choice: Choice, encoder: StreamEncoder, text: str) -> bytes:
        """What the end of a choice settles, and the events that tell why it ended."""
        data = b"" if choice.reader is None else encoder.said(choice.reader.finish())
        return data + encoder.finish(choice, await self._faults(answer, choice, text))

    async def _faults(self, answer: Answer, choice: Choice, text: str) -> list[str]:
        """How a complete answer fails its form: the engines' grammar cannot express all of every schema."""
        if choice.finish_reason != "stop" or choice.text.stopped:
            return []
        faults = await answer.prepared.faults(choice.reader, text)
        if faults:
            self.router.metrics.counters["answers_out_of_form"].labels(model=answer.model.name).inc()
        return faults


async def written(body: JsonObject) -> bytes:
    """An answer's body as JSON; a large one in a thread, beside everybody's streams."""
    if may_fit(body, INLINE_BODY_BYTES):
        return compact(body).encode()
    return (await asyncio.to_thread(compact_in_pieces, body)).encode()


def session_of(key: str | None) -> str:
    """Requests of one prompt_cache_key are one session, where no header names another."""
    return "" if key is None else f"prompt_cache_key-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _choice(
    index: int, place: int, request: GenerationRequest, model: ServedModel, call: GenerateCall, *, is_scoring: bool
) -> Choice:
    return Choice(
        index=index,
        call=replace(call, sampling=of_choice(call.sampling, place)),
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


def _text_of(said: Sequence[Said]) -> str:
    return "".join([one.text for one in said if isinstance(one, Content)])


def _of_prompt(answer: Answer, choice: Choice) -> object:
    """vLLM's prompt_logprobs."""
    top = answer.request.prompt_logprobs
    if top is None or choice.prompt_logprobs is None:
        return None
    return prompt_logprobs(choice.call.prompt, choice.prompt_logprobs, top, answer.model.renderer.table)


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
