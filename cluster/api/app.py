"""The ASGI app of a router replica: the same one behind its own listener and as a Serve ingress.

create_app(router, models, keys) -> Starlette     the caller starts and stops the router
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diptych.cluster.keys import ApiKeys
from diptych.cluster.router.router import Router
from diptych.cluster.router.session import EngineSession
from diptych.protos.errors import DiptychError, UnknownModel
from diptych.protos.openai_replies import JsonObject, model_card
from diptych.protos.strict_json import printable
from diptych.protos.types import Role

from .access import Access, Doorkeeper, GuardedRoute, guarded_default
from .capabilities import capabilities_of
from .chat import ChatEndpoint
from .completions import CompletionEndpoint
from .errors import on_error
from .generation import GenerationApp
from .served import ServedModel

_VERSIONS_OF = ("diptych", "grpcio", "starlette", "tokenizers", "uvicorn")


class _Pages:
    """The small endpoints."""

    def __init__(self, router: Router, models: dict[str, ServedModel], keys: ApiKeys | None) -> None:
        self._router = router
        self._keys = keys
        self._models = models
        self._versions = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
        self._versions["python"] = platform.python_version()

    async def models(self, request: Request) -> Response:
        cards = [self._card(model) for model in self._models.values()]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._models:
            raise UnknownModel(f"the model {printable(name)} is not served", "model")
        return JSONResponse(self._card(self._models[name]))

    def _card(self, model: ServedModel) -> JsonObject:
        room = min(model.max_context_tokens, self._router.view.capacity_tokens(model.name) or model.max_context_tokens)
        return model_card(model.name, model.created, room, model.defaults.given(), capabilities_of(model, room))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 when every model has a place to go, a connected decode engine, the first start-up is over, and this
        replica stays.
        """
        states = {name: {role.value: len(self._router.view.live(name, role)) for role in Role} for name in self._models}
        is_ready = (
            bool(states) and not request.app.state.is_leaving and all(self._router.is_ready(name) for name in states)
        )
        return JSONResponse({"ready": is_ready, "models": states}, 200 if is_ready else 503)

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
            if not self._router.view.live(name, Role.DECODE):
                degraded.append(f"{name}: no decode engine lives, requests are refused; `diptych scale` starts one")
        if self._keys is not None and self._keys.fault:
            degraded.append(self._keys.fault)
        router = {
            "id": self._router.router_id,
            "pid": os.getpid(),
            "in_flight": self._router.in_flight,
            "waiting": self._router.admission.waiting,
        }
        body = {
            "models": [self._card(model) for model in self._models.values()],
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


def create_app(router: Router, models: Iterable[ServedModel], keys: ApiKeys | None = None) -> Starlette:
    """The app. `router` must be started by the caller in the event loop that serves the app. With `keys` every route
    but /health and /ready asks for one.
    """
    served = {model.name: model for model in models}
    pages = _Pages(router, served, keys)
    door = Doorkeeper(keys, router.metrics)
    table: list[tuple[str, str, Callable[..., Any], Access]] = [
        ("POST", "/v1/chat/completions", GenerationApp(ChatEndpoint(), router, served), Access.TENANT),
        ("POST", "/v1/completions", GenerationApp(CompletionEndpoint(), router, served), Access.TENANT),
        ("GET", "/v1/models", pages.models, Access.TENANT),
        ("GET", "/v1/models/{name:path}", pages.model, Access.TENANT),
        ("GET", "/health", pages.health, Access.OPEN),
        ("GET", "/ready", pages.ready, Access.OPEN),
        ("GET", "/metrics", pages.metrics, Access.ADMIN),
        ("GET", "/info", pages.info, Access.ADMIN),
    ]
    routes = [GuardedRoute(path, to, method=method, access=who, doorkeeper=door) for method, path, to, who in table]
    handlers = {DiptychError: on_error, HTTPException: on_error, Exception: on_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.is_leaving = False  # set by who runs the replica
    app.router.redirect_slashes = False
    app.router.default = guarded_default(door, app.router.default)
    return app
