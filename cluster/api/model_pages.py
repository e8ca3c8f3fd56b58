"""GET /v1/models and /v1/models/{name}: the served models, in OpenAI's shape or, for its clients, in Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diptych.cluster.router.router import Router
from diptych.protos import anthropic_replies
from diptych.protos.errors import InvalidRequest, UnknownModel
from diptych.protos.openai_replies import JsonObject, model_card
from diptych.protos.strict_json import printable

from .capabilities import capabilities_of, capabilities_of_route
from .errors import is_anthropic
from .served import ServedModel
from .text_model import TextModel, text_capabilities

if TYPE_CHECKING:
    from .routed import RoutedModels

Cards = list[JsonObject]
LISTED = 20
MAX_LISTED = 1000
_QUERIES = frozenset({"after_id", "before_id", "limit", "lifecycle", "lifecycle[]", "beta"})
_LIFECYCLES = ("active", "deprecated", "retired")


class ModelPages:
    """The two routes."""

    def __init__(
        self,
        router: Router,
        models: Mapping[str, ServedModel],
        texts: Mapping[str, TextModel],
        routes: RoutedModels | None = None,
    ) -> None:
        """`texts`: models that embed or rank, which Anthropic's clients are not told of. A route stands for an own
        model of its name.
        """
        self._router = router
        self._routes = routes
        self._names = list(dict.fromkeys([*models, *(() if routes is None else routes.names)]))
        self._models = models
        self._texts = texts

    async def list(self, request: Request) -> Response:
        """All models; to Anthropic's clients in pages."""
        if is_anthropic(request.scope):
            return JSONResponse(self._page(request.query_params))
        for name in request.query_params:
            shown = printable(name)
            raise InvalidRequest(f"the query {shown} is for clients that send the header anthropic-version", shown)
        return JSONResponse({"object": "list", "data": self.cards()})

    async def one(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        if name in self._texts and not is_anthropic(request.scope):
            return JSONResponse(self._text_card(self._texts[name]))
        if name in self._texts:
            raise UnknownModel(self._texts[name].refusal("generate text").message, "model")
        if name not in self._names and self._routes_to(name) is None:
            raise UnknownModel(f"the model {printable(name)} is not served", "model")
        return JSONResponse(self._their_card(name) if is_anthropic(request.scope) else self._card_of(name))

    def cards(self) -> Cards:
        """Of all models."""
        return [*map(self._card_of, self._names), *map(self._text_card, self._texts.values())]

    def is_of_texts(self, name: str) -> bool:
        """Whether it embeds or ranks."""
        return name in self._texts

    def _text_card(self, model: TextModel) -> JsonObject:
        limits = self._router.settings.limits
        told = {"inputs": limits.embedding_inputs, "documents": limits.rerank_documents}
        told["tokens"] = limits.embedding_tokens
        return model_card(model.name, model.created, model.facts.max_tokens, {}, text_capabilities(model, told))

    def card(self, model: ServedModel) -> JsonObject:
        """A model in OpenAI's shape, with what it can do."""
        room = self._room(model)
        return model_card(model.name, model.created, room, model.defaults.given(), capabilities_of(model, room))

    def _card_of(self, name: str) -> JsonObject:
        routes = self._routes_to(name)
        if routes is None:
            return self.card(self._models[name])
        own = [self._models[pool] for pool in routes.pools_of(name) if pool in self._models]
        told = capabilities_of_route(
            routes.targets_of(name), [capabilities_of(model, self._room(model)) for model in own]
        )
        return model_card(name, routes.created, told["context_tokens"], {}, told) | {"owned_by": "gateway"}

    def _routes_to(self, name: str) -> RoutedModels | None:
        """Those that lead somewhere from `name`: of a route, or of a provider's model that clients may name."""
        routes = self._routes
        return routes if routes is not None and routes.takes(name, self._models) else None

    def _their_card(self, name: str) -> JsonObject:
        if (routes := self._routes_to(name)) is not None:
            told = self._card_of(name)["capabilities"]
            return anthropic_replies.model_card(
                name,
                routes.created,
                told["context_tokens"],
                is_reasoning=told["reasoning"] is not None,
                has_template=True,
            )
        model = self._models[name]
        return anthropic_replies.model_card(
            model.name,
            model.created,
            self._room(model),
            is_reasoning=model.format.reasoning is not None,
            has_template=model.renderer.has_template,
        )

    def _room(self, model: ServedModel) -> int:
        return min(model.max_context_tokens, self._router.view.capacity_tokens(model.name) or model.max_context_tokens)

    def _page(self, query: QueryParams) -> JsonObject:
        for name in query:
            if name not in _QUERIES:
                raise InvalidRequest(f"there is no query {printable(name)} here", printable(name))
        names = list(self._names) if _wants_active(query) else []
        limit = _limit(query.get("limit"))
        after, before = _place(query, "after_id", names), _place(query, "before_id", names)
        if after is not None and before is not None:
            raise InvalidRequest("after_id and before_id exclude each other", "before_id")
        if before is not None:
            shown = names[max(0, before - limit) : before]
            has_more = before > limit
        else:
            begin = 0 if after is None else after + 1
            shown = names[begin : begin + limit]
            has_more = len(names) > begin + limit
        return anthropic_replies.model_list([self._their_card(name) for name in shown], has_more=has_more)


def _wants_active(query: QueryParams) -> bool:
    """Every model here is active."""
    wanted = [*query.getlist("lifecycle"), *query.getlist("lifecycle[]")]
    for word in wanted:
        if word not in _LIFECYCLES:
            raise InvalidRequest(f"lifecycle must be one of {', '.join(_LIFECYCLES)}", "lifecycle")
    return not wanted or "active" in wanted


def _limit(text: str | None) -> int:
    if text is None:
        return LISTED
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_LISTED):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_LISTED}", "limit")
    return int(text)


def _place(query: QueryParams, field: str, names: Sequence[str]) -> int | None:
    name = query.get(field)
    if not name:
        return None
    if name not in names:
        raise InvalidRequest(f"{field}: the model {printable(name)} is not served", field)
    return names.index(name)
