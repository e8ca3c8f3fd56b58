"""POST /v1/responses and /v1/responses/input_tokens: a conversation read, answered, and kept.

What a request goes on from comes from responses_kept.py; what is answered before it is done goes to
responses_background.py; the events and the body are written by responses_endpoint.py. Batches call `Responses.whole`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.router.registry import TrackedRequest
from diptych.cluster.router.router import Router
from diptych.cluster.store.database import Store
from diptych.protos.errors import ContextTooLong, DiptychError, InvalidRequest, RequestError, RequestTooLarge
from diptych.protos.messages import Message
from diptych.protos.openai_replies import JsonObject
from diptych.protos.responses import ResponsesRequest, parse_input_tokens, parse_responses
from diptych.protos.responses_items import RESPONSE_ID, ItemIds, ItemReader, references
from diptych.protos.responses_replies import error_event, input_tokens

from .access import tenant_of
from .answer import Answer
from .answering import Answerer
from .body import read_body, refuse_body
from .errors import BodyTimeout, id_headers
from .generation import INLINE_BODY_BYTES, SSE_HEADERS, Origin, until_disconnect, written
from .lives import track
from .responses_background import BackgroundResponses, Job
from .responses_endpoint import ResponseEndpoint, renamed
from .responses_kept import PREVIOUS, Before, KeptResponses, frame_of
from .responses_seal import Seal
from .served import ServedModel

if TYPE_CHECKING:
    from .routed import RoutedAnswer, RoutedModels


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A response to be, of which nothing was begun. `items`: its own input as it is kept; `chain`: the responses before
    it.
    """

    request: ResponsesRequest
    endpoint: ResponseEndpoint
    answerer: Answerer
    answer: Answer | RoutedAnswer
    items: Sequence[JsonObject]
    chain: tuple[str, ...]


class Responses:
    """All of the endpoint that needs no connection. `background`: see there; whoever made this stops it."""

    def __init__(
        self, router: Router, models: dict[str, ServedModel], store: Store, routes: RoutedModels | None = None
    ) -> None:
        self.router = router
        self._routes = routes
        self.kept = KeptResponses(store, router.settings.responses, metrics=router.metrics)
        self.background = BackgroundResponses(router, self.kept, router.settings.responses)
        self._models = models

    async def draft(self, request: ResponsesRequest, origin: Origin, *, is_counted: bool = False) -> Draft:
        """Everything that can be refused is refused here. Raises RequestError, CapacityError. `is_counted`: nothing is
        wanted of it but its number of tokens.
        """
        fields = request.fields
        if request.stores and not is_counted:
            await self.kept.check_room(origin.tenant)
        seal = await self.kept.seal(origin.tenant)
        before = Before()
        if fields.previous_response_id is not None:
            before = await self.kept.before(origin.tenant, fields.previous_response_id)
        asked = set(references(request.items))
        referred = await self.kept.items(origin.tenant, asked) if asked else {}
        tracked = origin.tracked.id if origin.tracked is not None else ""
        own_id = tracked if RESPONSE_ID.fullmatch(tracked) else f"resp_{os.urandom(12).hex()}"
        items, messages = await asyncio.to_thread(_conversation, request, before, referred, own_id, seal)
        endpoint = ResponseEndpoint(request, seal, records=request.is_background)
        answerer = Answerer(endpoint, self.router, self._models, self._routes)
        answer: Answer | RoutedAnswer
        try:
            if is_counted:
                answer = await answerer.counted(request.as_chat(messages), origin)
            else:
                answer = await _fitted(answerer, request, messages, origin)
        except RequestError as exc:
            raise renamed(exc) from exc
        return Draft(
            request=request,
            endpoint=endpoint,
            answerer=answerer,
            answer=answer.named(own_id),
            items=items,
            chain=before.chain,
        )

    async def whole(self, draft: Draft) -> JsonObject:
        """The body, kept where that is asked for. Raises what ended it."""
        async with aclosing(draft.answerer.stream(draft.answer, draft.endpoint.begin_again)) as events:
            async for _ in events:
                pass
        if draft.endpoint.error is not None:
            raise draft.endpoint.error
        body, _ = draft.endpoint.conclude(draft.answer)
        await self.keep(draft, body)
        return body

    async def keep(self, draft: Draft, body: JsonObject) -> None:
        """What has ended. Raises CapacityError when the store cannot take it."""
        if draft.request.stores:
            await self.kept.keep(draft.answer.tenant, body, draft.items, draft.chain)

    async def count(self, body: bytes, origin: Origin) -> JsonObject:
        """The answer of /v1/responses/input_tokens. Raises RequestError."""
        request = await _parsed(parse_input_tokens, body)
        draft = await self.draft(request, origin, is_counted=True)
        return input_tokens(draft.answer.prompt_tokens)


def _conversation(
    request: ResponsesRequest, before: Before, referred: Mapping[str, JsonObject], own_id: str, seal: Seal
) -> tuple[list[JsonObject], tuple[Message, ...]]:
    reader = ItemReader(ItemIds(own_id), seal.open, referred)
    if request.fields.instructions:
        reader.instruct(request.fields.instructions)
    reader.read(before.items, PREVIOUS)
    items = reader.read(request.items, "input")
    return items, reader.messages()


async def _fitted(
    answerer: Answerer, request: ResponsesRequest, messages: tuple[Message, ...], origin: Origin
) -> Answer | RoutedAnswer:
    """Where the context is too small and `truncation` is auto, without the oldest turns: a turn begins with a user's
    message, and what system and developer say stays.
    """
    try:
        answer = await answerer.prepare(request.as_chat(messages), origin)
        if request.fields.truncation == "auto" and not isinstance(answer, Answer):
            raise InvalidRequest(
                "truncation: auto is for own models, whose tokens are counted here: leave it out for a route, which "
                "may have a context_fallback",
                "truncation",
            )
        return answer
    except ContextTooLong as exc:
        if request.fields.truncation != "auto":
            raise
        why = exc
    cuts = [at for at, message in enumerate(messages) if message.role == "user" and at][1:]
    least, found = 0, None
    most = len(cuts)
    while least < most or found is None:  # the fewest turns dropped, by halves
        middle = min((least + most) // 2, len(cuts) - 1)
        if not cuts or least > middle:
            break
        kept = [message for message in messages[: cuts[middle]] if message.role in ("system", "developer")]
        try:
            found = await answerer.prepare(request.as_chat((*kept, *messages[cuts[middle] :])), origin)
            most = middle
        except ContextTooLong as exc:
            least, why = middle + 1, exc
    if found is None:
        raise why  # of the fewest turns that were tried
    return found


async def _parsed(parse: Any, body: bytes) -> ResponsesRequest:
    request: ResponsesRequest = parse(body) if len(body) <= INLINE_BODY_BYTES else await asyncio.to_thread(parse, body)
    return request


class ResponsesApp:
    """The ASGI application of POST /v1/responses."""

    def __init__(self, responses: Responses) -> None:
        self._responses = responses
        self._router = responses.router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. The life of a background response lasts longer than its request's connection."""
        with ExitStack() as life:
            tracked = life.enter_context(track(self._router, scope, "resp_", self._router.clock()))
            await self._answer(tracked, life, scope, receive, send)

    async def _answer(
        self, tracked: TrackedRequest, life: ExitStack, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
            request = await _parsed(parse_responses, body)
            draft = await self._responses.draft(request, Origin.of(scope, tracked))
        except (RequestTooLarge, BodyTimeout) as exc:
            tracked.answered_with(exc)
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        told = id_headers(scope)
        if request.is_background:
            await self._begin(draft, life, told, receive, send)
        elif request.streams:
            await until_disconnect(receive, self._stream(draft, told, send))
        else:
            await until_disconnect(receive, self._whole(draft, told, send))

    async def _whole(self, draft: Draft, told: list[tuple[bytes, bytes]], send: Send) -> None:
        body = await self._responses.whole(draft)
        await send_json(body, [*told, *draft.answer.headers], send)

    async def _stream(self, draft: Draft, told: list[tuple[bytes, bytes]], send: Send) -> None:
        has_begun = False
        async with aclosing(draft.answerer.stream(draft.answer)) as events:
            async for data in events:
                if data:
                    if not has_begun:
                        has_begun = True
                        headers = [*SSE_HEADERS, *told, *draft.answer.headers]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        body, last = draft.endpoint.conclude(draft.answer)
        end = await asyncio.to_thread(draft.endpoint.emit, last)  # each of them tells all that was said
        try:
            await self._responses.keep(draft, body)
        except DiptychError as exc:
            end = frame_of(error_event(exc, last[0]["sequence_number"])).encode()
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _begin(
        self, draft: Draft, life: ExitStack, told: list[tuple[bytes, bytes]], receive: Receive, send: Send
    ) -> None:
        background, tenant, answer = self._responses.background, draft.answer.tenant, draft.answer
        events = draft.endpoint.announce(answer)
        body = events[0]["response"]
        await self._responses.kept.open(tenant, body, draft.items, draft.chain, events if draft.request.streams else [])
        job = Job(tenant=tenant, endpoint=draft.endpoint, answerer=draft.answerer, answer=answer, life=life.pop_all())
        background.begin(job)
        if draft.request.streams:
            await until_disconnect(receive, send_frames(background, tenant, answer.id, -1, told, send))
        else:
            await send_json(body, told, send)


class InputTokensApp:
    """The ASGI application of POST /v1/responses/input_tokens."""

    def __init__(self, responses: Responses) -> None:
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        router = self._responses.router
        origin = Origin(tenant=tenant_of(scope), arrived_at=router.clock())
        try:
            body = await read_body(scope, receive, router.settings.limits)
        except (RequestTooLarge, BodyTimeout) as exc:
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        await send_json(await self._responses.count(body, origin), [], send)


async def send_json(body: JsonObject, told: Sequence[tuple[bytes, bytes]], send: Send) -> None:
    """A whole answer."""
    data = await written(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *told]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": False})


async def send_frames(
    background: BackgroundResponses,
    tenant: str,
    response_id: str,
    after: int,
    told: Sequence[tuple[bytes, bytes]],
    send: Send,
) -> None:
    """The events of a background response behind number `after`, until it is over."""
    await send({"type": "http.response.start", "status": 200, "headers": [*SSE_HEADERS, *told]})
    async with aclosing(background.frames(tenant, response_id, after)) as frames:
        async for data in frames:
            await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
