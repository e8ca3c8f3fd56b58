"""The Ray Serve deployment `Router` of the app `diptych`: one router replica with its own HTTP listener, and the same
ASGI app as Serve's ingress. For Python users of Ray: `serve.get_app_handle("diptych").chat.remote({...})`.

torch is never imported in this process.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from diptych.cluster.config import RouterSettings
from diptych.cluster.inprocess import post_json
from diptych.cluster.models import ModelFolder
from diptych.cluster.observability.tracing import configure_tracing, flush_tracing
from diptych.protos.errors import EngineLost, InvalidRequest, error_from_code

APP_NAME = "diptych"
READY_POLL_S = 0.05
HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedModel:
    """A model that the router offers."""

    name: str
    folder: ModelFolder
    max_context_tokens: int | None
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPlan:
    """What a replica is told at birth."""

    settings: RouterSettings
    models: tuple[RoutedModel, ...]
    trace_file: Path | None = None


@serve.deployment(
    name="Router",
    num_replicas=1,
    max_ongoing_requests=10_000,  # admission is the router's own work, with a bounded queue
    health_check_period_s=5,
    health_check_timeout_s=10,
    max_constructor_retry_count=1,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class RouterDeployment:
    """Composition only: router, app, listener."""

    async def __init__(self, plan: RouterPlan) -> None:  # type: ignore[misc] # Serve awaits it
        from diptych.cluster.api.app import create_app
        from diptych.cluster.api.listener import start_listener
        from diptych.cluster.api.served import ServedModel
        from diptych.cluster.control.directory import ManagerDirectory
        from diptych.cluster.router.router import Router

        logging.getLogger("diptych").setLevel(logging.INFO)
        configure_tracing(plan.trace_file, "router")
        models = [
            ServedModel.load(m.name, m.folder, max_context_tokens=m.max_context_tokens, seed=m.seed)
            for m in plan.models
        ]
        self._names = [model.name for model in models]
        self._router = Router(directory=ManagerDirectory(), settings=plan.settings)
        await self._router.start()
        self._app = create_app(self._router, models)
        self._is_draining = False
        settings = plan.settings
        self._listener = await start_listener(self._app, host=settings.host, port=settings.port, limits=settings.limits)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Raises, and Serve replaces the replica, when the listener takes no connections."""
        if self._is_draining:
            return
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            _, writer = await asyncio.open_connection(self._listener.host, self._listener.port)
        writer.close()
        await writer.wait_closed()

    async def url(self) -> str:
        """Where the listener is."""
        return self._listener.url

    async def ready(self, timeout_s: float = 60.0) -> None:
        """Returns when every model has a place to go. Raises EngineLost after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not all(self._router.is_ready(name) for name in self._names):  # noqa: ASYNC110 - start-up only
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise EngineLost(f"no decode engine could be reached within {timeout_s:g} s") from None

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, let running requests end for `grace_s` seconds, cancel the rest."""
        self._is_draining = True
        await self._listener.stop(grace_s)
        await self._router.stop()
        flush_tracing()

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion, whole: the body and the answer of POST /v1/chat/completions. Raises its errors."""
        return await self._post("/v1/chat/completions", body)

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A text completion, whole: the body and the answer of POST /v1/completions. Raises its errors."""
        return await self._post("/v1/completions", body)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("stream"):
            raise InvalidRequest("streaming goes through HTTP; a handle call returns the whole answer", "stream")
        status, answer = await post_json(self._app, path, json.dumps(body).encode())
        if status != 200:
            error = answer["error"]
            raise error_from_code(error.get("code") or "internal_error", error["message"])
        return answer
