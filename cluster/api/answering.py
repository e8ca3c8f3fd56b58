"""A generating endpoint as HTTP, batches and stored responses use it: answers of own models by generation.py, of
gateway routes by routed.py. Which of the two a request gets is decided here, by its `model`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.router.registry import TrackedRequest
from diptych.cluster.router.router import Router
from diptych.protos.errors import RequestTooLarge
from diptych.protos.openai import ChatRequest, GenerationRequest
from diptych.protos.openai_replies import JsonObject

from .answer import Answer
from .body import read_body, refuse_body
from .endpoint import Endpoint, Void
from .errors import BodyTimeout, id_headers
from .generation import SSE_HEADERS, Generator, Origin, until_disconnect, written
from .lives import track
from .prepared import Header
from .served import ServedModel

if TYPE_CHECKING:  # where there are no routes, nothing of the gateway is imported
    from .routed import RoutedAnswer, RoutedModels


class Answerer:
    """Answers of one endpoint, without a connection. `routes` None: there are own models alone."""

    def __init__(
        self,
        endpoint: Endpoint,
        router: Router,
        models: dict[str, ServedModel],
        routes: RoutedModels | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.router = router
        self._own = Generator(endpoint, router, models)
        self._models = models
        self._routes = routes

    async def parse(self, body: bytes) -> GenerationRequest:
        """The checked body. Raises InvalidRequest."""
        return await self._own.parse(body)

    async def prepare(self, request: GenerationRequest, origin: Origin, body: bytes = b"") -> Answer | RoutedAnswer:
        """The answer to be, of which nothing was begun; `body` is the request as it came, where bytes may be passed on
        as they are. Raises RequestError.
        """
        routes = self._routes
        if routes is None:
            return await self._own.prepare(request, origin)
        if isinstance(request, ChatRequest) and routes.takes(request.model, self._models):
            return await routes.prepare(request, origin, self.endpoint, body)
        if request.model not in self._models:
            raise routes.unknown(request.model, self._models, is_chat=isinstance(request, ChatRequest))
        return await self._own.prepare(request, origin)

    async def counted(self, request: ChatRequest, origin: Origin) -> Answer:
        """Prepared for its number of tokens alone: by an own pool's where `model` is a route. Raises RequestError."""
        return await self._own.prepare(countable(request, self._models, self._routes), origin)

    async def whole(self, answer: Answer | RoutedAnswer) -> JsonObject:
        """The body of the whole answer. Raises what ended it."""
        return await (self._own.whole(answer) if isinstance(answer, Answer) else answer.whole())

    def stream(self, answer: Answer | RoutedAnswer, void: Void | None = None) -> AsyncGenerator[bytes, None]:
        """The answer's events, encoded, the last of which ends it. Raises what ended it before its first one; a later
        failure is the last event. `void`: called when another target of a route begins again, and the events so far are
        void, for who shows none of them before the end.
        """
        return self._own.stream(answer) if isinstance(answer, Answer) else answer.stream(void)


def countable(request: ChatRequest, models: dict[str, ServedModel], routes: RoutedModels | None) -> ChatRequest:
    """The same of an own model. Raises InvalidRequest for a route without one."""
    if routes is None or not routes.takes(request.model, models):
        return request
    return request.model_copy(update={"model": routes.counting_model(request.model)})


class GenerationApp:
    """The ASGI application of one endpoint."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._router = answerer.router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        arrived_at = self._router.clock()  # the head is here; body, template and tokenizer take of the request's time
        with track(self._router, scope, self._answerer.endpoint.id_prefix, arrived_at) as tracked:
            await self._answer(tracked, scope, receive, send)

    async def _answer(self, tracked: TrackedRequest, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
            request = await self._answerer.parse(body)
            answer = await self._answerer.prepare(request, Origin.of(scope, tracked), body)
        except (RequestTooLarge, BodyTimeout) as exc:
            tracked.answered_with(exc)
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        ids = id_headers(scope)
        reply = self._stream(answer, ids, send) if answer.request.stream else self._whole(answer, ids, send)
        await until_disconnect(receive, reply)

    async def _whole(self, answer: Answer | RoutedAnswer, ids: list[Header], send: Send) -> None:
        body = await written(await self._answerer.whole(answer))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *ids,
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream(self, answer: Answer | RoutedAnswer, ids: list[Header], send: Send) -> None:
        has_begun = False
        async with aclosing(self._answerer.stream(answer)) as events:
            async for data in events:
                if not has_begun:
                    has_begun = True
                    start: dict[str, Any] = {"type": "http.response.start", "status": 200}
                    start["headers"] = [*SSE_HEADERS, *ids, *answer.headers]
                    await send(start)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
