"""What a batch may ask: the endpoints, each as a reader of bodies and something that answers one, without a connection.

`targets_of` is the table. A line goes the road of an HTTP request behind its connection, with a lower priority.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from pydantic import BaseModel

from diptych.cluster.api.answering import Answerer
from diptych.cluster.api.chat import ChatEndpoint
from diptych.cluster.api.completions import CompletionEndpoint
from diptych.cluster.api.embeddings import EmbeddingsEndpoint
from diptych.cluster.api.generation import Origin
from diptych.cluster.api.responses import Responses
from diptych.cluster.api.served import ServedModel
from diptych.cluster.api.text_model import Generators, TextModel
from diptych.cluster.api.texts import TextAnswers
from diptych.cluster.keys import Key
from diptych.cluster.router.registry import TrackedRequest
from diptych.cluster.router.router import Router
from diptych.cluster.store.database import Store
from diptych.protos.errors import InvalidRequest, UnknownModel
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_batches import ENDPOINTS
from diptych.protos.responses import parse_responses
from diptych.protos.strict_json import printable
from diptych.protos.wire_checks import JsonObject

if TYPE_CHECKING:
    from diptych.cluster.api.routed import RoutedModels

RequestT = TypeVar("RequestT", bound=BaseModel)


class Attempt:
    """One time that a line is answered. `id` is told with the result."""

    def __init__(self, tenant: str, endpoint: str, id_prefix: str, born: float, key: Key | None = None) -> None:
        self._key = key
        self.tracked = TrackedRequest(id_prefix + os.urandom(12).hex(), tenant=tenant, endpoint=endpoint, born=born)

    @property
    def origin(self) -> Origin:
        """Who asks, since when."""
        return Origin(tenant=self.tracked.tenant, arrived_at=self.tracked.born, tracked=self.tracked, key=self._key)

    @property
    def id(self) -> str:
        """As an HTTP request's."""
        return self.tracked.id

    @property
    def was_placed(self) -> bool:
        """Whether it was given to an engine."""
        return any(life.num_placements for life in self.tracked.lives)

    @property
    def has_tokens(self) -> bool:
        """Whether an engine got as far as a first token."""
        return self.tracked.num_tokens > 0


class BatchTarget(Protocol):
    """An endpoint as batches use it."""

    def check(self, body: bytes) -> str:
        """The model that a body is for; called in a thread. Raises RequestError."""

    def attempt(self, tenant: str, key: Key | None = None) -> Attempt:
        """Before each `answer`; `key`: that made the batch."""

    async def answer(self, body: bytes, attempt: Attempt, tenant: str) -> JsonObject:
        """The whole answer's body. Raises DiptychError."""


class _Lowered:
    """How urgent a batch's request is: what its line asks for, behind everything that somebody waits for."""

    def __init__(self, priority: int) -> None:
        self._priority = priority

    def __call__(self, request: RequestT) -> RequestT:
        own = max(getattr(request, "priority", None) or 0, 0)
        return request.model_copy(update={"priority": min(own + self._priority, 2**31 - 1)})


class GenerationTarget:
    """Chat or completions."""

    def __init__(
        self,
        path: str,
        answerer: Answerer,
        models: Mapping[str, ServedModel],
        lowered: _Lowered,
        routes: RoutedModels | None = None,
    ) -> None:
        self._path = path
        self._generator = answerer
        self._models = models
        self._routes = routes
        self._lowered = lowered

    def check(self, body: bytes) -> str:
        """As the endpoint's own reader; what would need a connection is refused."""
        request = self._generator.endpoint.parse(body)
        if request.stream:
            raise InvalidRequest("stream: a batch's answers are whole; leave it out", "stream")
        if (
            self._routes is not None
            and isinstance(request, ChatRequest)
            and self._routes.takes(request.model, self._models)
        ):
            return request.model
        return _served(request.model, self._models, self._routes)

    def attempt(self, tenant: str, key: Key | None = None) -> Attempt:
        """As an HTTP request's."""
        return Attempt(tenant, self._path, self._generator.endpoint.id_prefix, self._generator.router.clock(), key)

    async def answer(self, body: bytes, attempt: Attempt, tenant: str) -> JsonObject:
        """Through admission, placement and engines."""
        request = self._lowered(await self._generator.parse(body))
        return await self._generator.whole(await self._generator.prepare(request, attempt.origin))


class ResponsesTarget:
    """Responses, kept where the line does not say `store: false`."""

    def __init__(
        self,
        path: str,
        responses: Responses,
        models: Mapping[str, ServedModel],
        lowered: _Lowered,
        routes: RoutedModels | None = None,
    ) -> None:
        self._path = path
        self._responses = responses
        self._models = models
        self._routes = routes
        self._lowered = lowered

    def check(self, body: bytes) -> str:
        """As the endpoint's own reader; what would need a connection is refused."""
        request = parse_responses(body)
        if request.streams:
            raise InvalidRequest("stream: a batch's answers are whole; leave it out", "stream")
        if request.is_background:
            raise InvalidRequest("background: a batch is in the background as it is; leave it out", "background")
        name = request.fields.model
        if self._routes is not None and self._routes.takes(name, self._models):
            return name
        return _served(name, self._models, self._routes)

    def attempt(self, tenant: str, key: Key | None = None) -> Attempt:
        """As an HTTP request's."""
        return Attempt(tenant, self._path, "resp_", self._responses.router.clock(), key)

    async def answer(self, body: bytes, attempt: Attempt, tenant: str) -> JsonObject:
        """Through admission, placement and engines, and into the store."""
        request = await asyncio.to_thread(parse_responses, body)
        request = replace(request, chat=self._lowered(request.chat))
        return await self._responses.whole(await self._responses.draft(request, attempt.origin))


class EmbeddingsTarget:
    """Embeddings."""

    def __init__(
        self,
        path: str,
        router: Router,
        texts: Mapping[str, TextModel],
        models: Mapping[str, ServedModel],
        lowered: _Lowered,
    ) -> None:
        self._path = path
        self._router = router
        self._answers = TextAnswers(EmbeddingsEndpoint(), router, texts, models)
        self._texts = texts
        self._models = models
        self._lowered = lowered

    def check(self, body: bytes) -> str:
        """As the endpoint's own reader."""
        request = self._answers.endpoint.parse(body, self._router.settings.limits)
        if request.model in self._models:
            raise InvalidRequest(f"the model {printable(request.model)} generates text and does not embed", "model")
        return _served(request.model, self._texts)

    def attempt(self, tenant: str, key: Key | None = None) -> Attempt:
        """As an HTTP request's."""
        return Attempt(tenant, self._path, self._answers.endpoint.id_prefix, self._router.clock(), key)

    async def answer(self, body: bytes, attempt: Attempt, tenant: str) -> JsonObject:
        """Through the router's line and an engine."""
        request = self._lowered(await self._answers.parse(body))
        data = await self._answers.whole(request, attempt.origin, attempt.id)
        answer: JsonObject = await asyncio.to_thread(json.loads, data)
        return answer


def _served(name: str, models: Mapping[str, object], routes: RoutedModels | None = None) -> str:
    if models.get(name) is None:
        known = ", ".join(sorted({*models, *(() if routes is None else routes.names)})) or "none of the kind"
        raise UnknownModel(f"the model {printable(name)} is not served; there is: {known}", "model")
    return name


def targets_of(
    router: Router,
    models: Iterable[ServedModel | TextModel],
    store: Store,
    routes: RoutedModels | None = None,
) -> dict[str, BatchTarget]:
    """By path; all that this router's batches may ask."""
    models = tuple(models)
    texts = {model.name: model for model in models if isinstance(model, TextModel)}
    served = Generators((model for model in models if not isinstance(model, TextModel)), texts)
    lowered = _Lowered(router.settings.batches.priority)
    chat, completions, embeddings, responses = ENDPOINTS
    return {
        chat: GenerationTarget(chat, Answerer(ChatEndpoint(), router, served, routes), served, lowered, routes),
        completions: GenerationTarget(completions, Answerer(CompletionEndpoint(), router, served), served, lowered),
        embeddings: EmbeddingsTarget(embeddings, router, texts, served, lowered),
        responses: ResponsesTarget(responses, Responses(router, served, store, routes), served, lowered, routes),
    }
