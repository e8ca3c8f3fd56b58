"""What the endpoints of texts share: body to rows of tokens to an answer in one piece, disconnects, wrong models.

embeddings.py and rerank.py say what differs. `TextAnswers` is without a connection: batches use it, too.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.config import LimitSettings
from diptych.cluster.router.embedding import EmbedCall
from diptych.cluster.router.registry import TrackedRequest
from diptych.cluster.router.router import Router
from diptych.protos.embedding import EmbedKind, TextRow
from diptych.protos.errors import InvalidRequest, RequestTooLarge, UnknownModel
from diptych.protos.strict_json import printable

from .body import read_body, refuse_body
from .errors import BodyTimeout, id_headers
from .generation import INLINE_BODY_BYTES, Origin, until_disconnect
from .lives import track
from .served import ServedModel
from .text_model import TextModel

if TYPE_CHECKING:
    from .routed import RoutedModels

RequestT = TypeVar("RequestT", bound="TextRequest")


class TextRequest(Protocol):
    """What both requests have."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def timeout_s(self) -> float | None:
        """As asked."""

    @property
    def priority(self) -> int | None:
        """As asked."""


@dataclass(frozen=True, slots=True)
class Texts:
    """A request's texts, ready for an engine; see EmbedOrder."""

    kind: EmbedKind
    rows: list[TextRow]
    skip: int = 0
    dimensions: int = 0

    @property
    def num_tokens(self) -> int:
        """Of all of them."""
        return sum(len(row.ids) for row in self.rows)


def check_number(num_tokens: int, field: str, limits: LimitSettings) -> None:
    """Raises InvalidRequest for more tokens than a request may have."""
    if num_tokens > (most := limits.embedding_tokens):
        raise InvalidRequest(f"{field} has {num_tokens} tokens in all; the limit is {most}", field)


class TextEndpoint(Protocol[RequestT]):
    """What differs between the endpoints."""

    id_prefix: str
    wanted: str  # what the model must do, in words
    texts_field: str  # of the request

    def parse(self, body: bytes, limits: LimitSettings) -> RequestT:
        """The checked body. Raises InvalidRequest."""

    async def prepare(self, request: RequestT, model: TextModel) -> Texts:
        """Raises InvalidRequest, ContextTooLong."""

    def answer(self, request: RequestT, model: TextModel, texts: Texts, values: list[array[float]], id: str) -> bytes:
        """The body of the answer. Called in a thread."""


class TextAnswers(Generic[RequestT]):
    """Answers of one endpoint, without a connection. `generators`: the served models that make text."""

    def __init__(
        self,
        endpoint: TextEndpoint[RequestT],
        router: Router,
        models: Mapping[str, TextModel],
        generators: Mapping[str, ServedModel],
        routes: RoutedModels | None = None,
    ) -> None:
        self._routes = routes
        self.endpoint = endpoint
        self._router = router
        self._models = models
        self._generators = generators

    async def parse(self, body: bytes) -> RequestT:
        """The checked body; a large one is looked at in a thread. Raises InvalidRequest."""
        limits = self._router.settings.limits
        if len(body) <= INLINE_BODY_BYTES:
            return self.endpoint.parse(body, limits)
        return await asyncio.to_thread(self.endpoint.parse, body, limits)

    async def whole(self, request: RequestT, origin: Origin, id: str) -> bytes:
        """The body of the answer. Raises RequestError, and what Router.embed raises."""
        model = self._model(request.model)
        priority = origin.priority(request.priority)
        self._router.check_room(model.name, origin.tenant, priority)
        texts = await self.endpoint.prepare(request, model)
        check_number(texts.num_tokens, self.endpoint.texts_field, self._router.settings.limits)
        call = EmbedCall(
            model=model.name,
            kind=texts.kind,
            rows=tuple(texts.rows),
            skip=texts.skip,
            dimensions=texts.dimensions,
            timeout_s=request.timeout_s,
            arrived_at=origin.arrived_at,
            traceparent=origin.traceparent,
            priority=priority,
            tenant=origin.tenant,
            tracked=origin.tracked,
        )
        told = await self._router.embed(call)
        return await asyncio.to_thread(self.endpoint.answer, request, model, texts, told.values, id)

    def _model(self, name: str) -> TextModel:
        model = self._models.get(name)
        if model is not None:
            return model
        if name in self._generators:
            own = "POST /v1/chat/completions and /v1/completions"
            if not self._generators[name].renderer.has_template:
                own = "POST /v1/completions"
            raise InvalidRequest(
                f"the model {printable(name)} generates text and does not {self.endpoint.wanted}; it answers {own}. To "
                "have a causal model embed, serve it a second time with task: embed",
                "model",
            )
        if self._routes is not None and self._routes.takes(name, self._generators):
            raise self._routes.unknown(name, self._models, is_chat=False)
        known = ", ".join(sorted([*self._models, *self._generators]))
        raise UnknownModel(f"the model {printable(name)} is not served; there is: {known}", "model")


class TextsApp(Generic[RequestT]):
    """The ASGI application of one endpoint."""

    def __init__(self, answers: TextAnswers[RequestT], router: Router) -> None:
        self._answers = answers
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        arrived_at = self._router.clock()
        with track(self._router, scope, self._answers.endpoint.id_prefix, arrived_at) as tracked:
            await self._answer(tracked, scope, receive, send)

    async def _answer(self, tracked: TrackedRequest, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
        except (RequestTooLarge, BodyTimeout) as exc:
            tracked.answered_with(exc)
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        request = await self._answers.parse(body)
        await until_disconnect(receive, self._whole(request, tracked, scope, send))

    async def _whole(self, request: RequestT, tracked: TrackedRequest, scope: Scope, send: Send) -> None:
        body = await self._answers.whole(request, Origin.of(scope, tracked), tracked.id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *id_headers(scope),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
