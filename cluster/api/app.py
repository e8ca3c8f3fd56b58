"""The ASGI app of a router replica: the same one behind its own listener and as a Serve ingress.

create_app(router, models, keys, store=store, routes=routes) -> Starlette

The caller starts and stops router, store and the gateway of the routes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import isroutine
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diptych.cluster.config import RouterSettings
from diptych.cluster.keys import ApiKeys
from diptych.cluster.router.router import Router
from diptych.cluster.router.session import EngineSession
from diptych.cluster.security_settings import API_PLAINTEXT
from diptych.cluster.store.database import Store
from diptych.protos.errors import DiptychError
from diptych.protos.openai_replies import JsonObject
from diptych.protos.types import Role

from .access import Access, Doorkeeper, GuardedRoute, guarded_default
from .answering import Answerer, GenerationApp
from .batches import BatchesPages, BatchMaking
from .browser import BrowserGuard
from .chat import ChatEndpoint
from .completions import CompletionEndpoint
from .embeddings import EmbeddingsEndpoint
from .errors import Barrier, on_error
from .files import FilesPages, FileUpload
from .idempotency import Idempotency
from .lives import LivesPages
from .messages import MessagesEndpoint, TokenCounter, Versioned
from .model_pages import ModelPages
from .openapi import DescriptionPage
from .rerank import RerankEndpoint
from .responses import InputTokensApp, Responses, ResponsesApp
from .responses_pages import ResponsesPages
from .route_explain import RouteExplainApp
from .served import ServedModel
from .text_model import Generators, TextModel
from .texts import TextAnswers, TextsApp
from .tokenize import BodyApp, TokenPages
from .usage import UsagePage

if TYPE_CHECKING:
    from .routed import RoutedModels

_VERSIONS_OF = ("diptych", "grpcio", "starlette", "tokenizers", "uvicorn")


class _Pages:
    """The small endpoints."""

    def __init__(self, router: Router, models: Sequence[str], keys: ApiKeys | None, model_pages: ModelPages) -> None:
        self._router = router
        self._keys = keys
        self._models = models
        self._model_pages = model_pages
        self._versions = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
        self._versions["python"] = platform.python_version()

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 when every model has a place to go, a connected engine that answers, the first start-up is over, and
        this replica stays.
        """
        states = {name: self._pools(name) for name in self._models}
        is_ready = (
            bool(states) and not request.app.state.is_leaving and all(self._router.is_ready(name) for name in states)
        )
        return JSONResponse({"ready": is_ready, "models": states}, 200 if is_ready else 503)

    def _pools(self, name: str) -> dict[str, int]:
        roles = (Role.EMBED,) if self._model_pages.is_of_texts(name) else (Role.PREFILL, Role.DECODE)
        return {role.value: len(self._router.view.live(name, role)) for role in roles}

    async def metrics(self, request: Request) -> Response:
        return Response(self._router.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def info(self, request: Request) -> Response:
        sessions = list(self._router.view.sessions())
        engines = [_engine_info(session) for session in sessions]
        degraded = sorted({choice for session in sessions for choice in session.info.degraded})
        for name in self._models:
            pools = {session.info.layout for session in sessions if session.info.model == name}
            if "disaggregated" in pools and not self._router.view.live(name, Role.PREFILL):
                degraded.append(f"{name}: no prefill engine lives, decode engines compute the prompts")
            role = Role.EMBED if self._model_pages.is_of_texts(name) else Role.DECODE
            if not self._router.view.live(name, role):
                degraded.append(f"{name}: no {role} engine lives, requests are refused; `diptych scale` starts one")
        if self._keys is not None and self._keys.fault:
            degraded.append(self._keys.fault)
        degraded += [API_PLAINTEXT] if self._router.settings.leaves_host else []
        router = {
            "id": self._router.router_id,
            "pid": os.getpid(),
            "in_flight": self._router.in_flight,
            "waiting": self._router.admission.waiting,
        }
        body = {
            "models": self._model_pages.cards(),
            "engines": engines,
            "membership_version": self._router.view.version,
            "routers": [router],
            "losses": [dataclasses.asdict(loss) for loss in self._router.losses],
            "last_requests": [dataclasses.asdict(entry) for entry in self._router.recent],
            "degraded": degraded,
            "versions": self._versions,
        }
        return JSONResponse(body)


def _engine_info(session: EngineSession) -> JsonObject:
    info, status = session.info, session.status
    return {
        "engine": info.ref.engine_id,
        "roles": sorted(info.roles),
        "model": info.model,
        "connected": session.is_ready,
        "draining": info.draining,
        "pid": info.pid,
        "host": info.host,
        "epoch": info.ref.epoch,
        "dtype": info.dtype,
        "max_context_tokens": info.max_context_tokens,
        "block_tokens": info.block_tokens,
        "blocks": dataclasses.asdict(status.blocks),
        "running": status.running,
        "waiting": status.waiting,
        "transfers": status.transfers,
        "ring_slots_busy": status.ring_slots_busy,
        "steps": status.steps,
        "in_flight_here": session.in_flight,
        "counters": dict(status.counters),
        "degraded": list(info.degraded),
    }


Row = tuple[str, str, Callable[..., Any], Access]  # method, path, application or handler, who may


def _generating(router: Router, served: Generators, responses: Responses, routes: RoutedModels | None) -> list[Row]:
    pages = ResponsesPages(responses)
    chat, completions, messages = (
        GenerationApp(Answerer(endpoint, router, served, routes))
        for endpoint in (ChatEndpoint(), CompletionEndpoint(), MessagesEndpoint())
    )
    counter = Versioned(BodyApp(router, TokenCounter(served, routes)))
    return [
        ("POST", "/v1/chat/completions", chat, Access.INFERENCE),
        ("POST", "/v1/completions", completions, Access.INFERENCE),
        ("POST", "/v1/messages", Versioned(messages), Access.INFERENCE),
        ("POST", "/v1/messages/count_tokens", counter, Access.ANSWERS),
        ("POST", "/v1/responses", ResponsesApp(responses), Access.INFERENCE),
        ("POST", "/v1/responses/input_tokens", InputTokensApp(responses), Access.ANSWERS),
        ("POST", "/v1/responses/compact", pages.compact, Access.ANSWERS),
        ("GET", "/v1/responses/{id}", pages.one, Access.ANSWERS),
        ("DELETE", "/v1/responses/{id}", pages.delete, Access.ANSWERS),
        ("POST", "/v1/responses/{id}/cancel", pages.cancel, Access.ANSWERS),
        ("GET", "/v1/responses/{id}/input_items", pages.items, Access.ANSWERS),
        ("POST", "/v1/route/explain", RouteExplainApp(router, served, routes), Access.TENANT),
    ]


def _of_texts(
    router: Router, served: Generators, texts: Mapping[str, TextModel], routes: RoutedModels | None
) -> list[Row]:
    tokens = TokenPages(router, served, texts, routes)
    tokenize, detokenize = BodyApp(router, tokens.tokenize), BodyApp(router, tokens.detokenize)
    embedded = TextsApp(TextAnswers(EmbeddingsEndpoint(), router, texts, served, routes), router)
    reranked = TextsApp(TextAnswers(RerankEndpoint(), router, texts, served, routes), router)
    return [
        ("POST", "/v1/tokenize", tokenize, Access.ANSWERS),
        ("POST", "/v1/detokenize", detokenize, Access.ANSWERS),
        ("POST", "/tokenize", tokenize, Access.ANSWERS),
        ("POST", "/detokenize", detokenize, Access.ANSWERS),
        ("POST", "/v1/embeddings", embedded, Access.INFERENCE),
        ("POST", "/v1/rerank", reranked, Access.INFERENCE),
        ("POST", "/v2/rerank", reranked, Access.INFERENCE),
    ]


def _of_files(store: Store, settings: RouterSettings, once: Callable[[Any], Any]) -> list[Row]:
    files, batches = FilesPages(store, settings.files), BatchesPages(store)
    return [
        ("POST", "/v1/files", FileUpload(store, settings.files, settings.limits), Access.FILES),
        ("GET", "/v1/files", files.list, Access.FILES),
        ("GET", "/v1/files/{id}", files.one, Access.FILES),
        ("GET", "/v1/files/{id}/content", files.content, Access.FILES),
        ("DELETE", "/v1/files/{id}", files.delete, Access.FILES),
        ("POST", "/v1/batches", once(BatchMaking(store, settings)), Access.FILES),
        ("GET", "/v1/batches", batches.list, Access.FILES),
        ("GET", "/v1/batches/{id}", batches.one, Access.FILES),
        ("POST", "/v1/batches/{id}/cancel", batches.cancel, Access.FILES),
    ]


def _small(router: Router, pages: _Pages, models: ModelPages, keys: ApiKeys | None, usage: UsagePage) -> list[Row]:
    lives = LivesPages(router)
    return [
        ("GET", "/v1/requests", lives.list, Access.TENANT),
        ("GET", "/v1/requests/{id}", lives.one, Access.TENANT),
        ("POST", "/v1/requests/{id}/cancel", lives.cancel, Access.TENANT),
        ("GET", "/v1/usage", usage.page, Access.TENANT),
        ("GET", "/v1/models", models.list, Access.TENANT),
        ("GET", "/v1/models/{name:path}", models.one, Access.TENANT),
        ("GET", "/openapi.json", DescriptionPage(keys).page, Access.TENANT),
        ("GET", "/health", pages.health, Access.OPEN),
        ("GET", "/ready", pages.ready, Access.OPEN),
        ("GET", "/metrics", pages.metrics, Access.ADMIN),
        ("GET", "/info", pages.info, Access.ADMIN),
    ]


def create_app(
    router: Router,
    models: Iterable[ServedModel | TextModel],
    keys: ApiKeys | None = None,
    *,
    store: Store,
    routes: RoutedModels | None = None,
) -> Starlette:
    """The app. `router` and `store` must be started by the caller in the event loop that serves the app. Where
    `keys` knows any, every route but /health and /ready asks for one.
    """
    models = tuple(models)
    texts = {model.name: model for model in models if isinstance(model, TextModel)}
    served = Generators((model for model in models if not isinstance(model, TextModel)), texts)
    model_pages = ModelPages(router, served, texts, routes)
    settings = router.settings
    responses = Responses(router, served, store, routes)
    door = Doorkeeper(keys, router.metrics, settings.tenants, most_open=settings.limits.max_connections)
    once = Idempotency(store, router).around
    pages = _Pages(router, [model.name for model in models], keys, model_pages)
    usage = UsagePage(store, {} if routes is None else routes.gateway.settings.budgets)
    table = [
        *_generating(router, served, responses, routes),
        *_of_texts(router, served, texts, routes),
        *_of_files(store, settings, once),
        *_small(router, pages, model_pages, keys, usage),
    ]
    table = [
        (how, path, once(to) if how == "POST" and who is Access.INFERENCE and not isroutine(to) else to, who)
        for how, path, to, who in table
    ]
    guarded = [GuardedRoute(path, to, method=method, access=who, doorkeeper=door) for method, path, to, who in table]
    handlers = {DiptychError: on_error, HTTPException: on_error, Exception: on_error}
    app = Starlette(routes=guarded, exception_handlers=handlers)
    app.add_middleware(Barrier, metrics=router.metrics)
    app.add_middleware(
        BrowserGuard,
        hosts=settings.browser.hosts,
        origins=settings.browser.origins,
        keys=keys,
        metrics=router.metrics,
    )
    app.state.is_leaving = False  # set by who runs the replica
    app.state.background = responses.background  # stopped by who runs the replica, before router and store
    app.router.redirect_slashes = False
    app.router.default = guarded_default(door, app.router.default)
    return app
