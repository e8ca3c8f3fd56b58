"""The Ray Serve app `diptych`. Its deployment `Router` is one router replica with its own HTTP listener, and the same
ASGI app as Serve's ingress. For Python users of Ray: `serve.get_app_handle("diptych").chat.remote({...})`.

`build` is for `serve run` and `serve deploy` on a Ray cluster that exists: there the deployment `Pools` brings the
engines up and takes them down. torch is never imported in these processes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from diptych.cluster.config import DiptychConfig, RouterSettings, SecuritySettings, check_config, load_config
from diptych.cluster.control.sigterm import work_before_sigterm_ends
from diptych.cluster.inprocess import post_json
from diptych.cluster.models import ModelFolder
from diptych.cluster.observability.tracing import configure_tracing, flush_tracing
from diptych.protos.errors import EngineLost, InvalidRequest, StartupError, error_from_code
from diptych.protos.faults import FaultSettings, plan_of
from diptych.protos.trust import ROUTER
from diptych.protos.types import EngineRef

APP_NAME = "diptych"
READY_POLL_S = 0.05
HEALTH_TIMEOUT_S = 5.0
SHUTDOWN_MARGIN_S = 15.0


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
    security: SecuritySettings
    trace_file: Path | None = None
    faults: FaultSettings = field(default_factory=FaultSettings)


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

    async def __init__(self, plan: RouterPlan | DeploymentHandle[Any]) -> None:  # type: ignore[misc] # Serve awaits it
        from diptych.cluster.api.app import create_app
        from diptych.cluster.api.listener import start_listener
        from diptych.cluster.api.served import ServedModel
        from diptych.cluster.control.directory import ManagerDirectory
        from diptych.cluster.control.gcs import GcsStore
        from diptych.cluster.control.keyring import fetch
        from diptych.cluster.keys import ApiKeys
        from diptych.cluster.router.router import Router
        from diptych.cluster.security import trust_of

        logging.getLogger("diptych").setLevel(logging.INFO)
        if isinstance(plan, DeploymentHandle):  # of Pools: waits until the engines are ready
            plan = cast("RouterPlan", await plan.router_plan.remote())
        configure_tracing(plan.trace_file, "router")
        models = [
            ServedModel.load(m.name, m.folder, max_context_tokens=m.max_context_tokens, seed=m.seed)
            for m in plan.models
        ]
        self._names = [model.name for model in models]
        trust = trust_of(plan.security, fetch(GcsStore()), ROUTER)
        faults = plan_of(plan.faults, "router")
        self._router = Router(directory=ManagerDirectory(faults), settings=plan.settings, trust=trust, faults=faults)
        await self._router.start()
        file = plan.security.api_keys
        self._app = create_app(self._router, models, None if file is None else ApiKeys(file))
        self._own_app = create_app(self._router, models)  # for handles: who calls one holds Ray's token
        self._is_draining = False
        loop = asyncio.get_running_loop()
        work_before_sigterm_ends(lambda: self._end_in_order(loop))
        self._settings = settings = plan.settings
        self._listener = await start_listener(
            self._app,
            host=settings.host,
            port=settings.port,
            limits=settings.limits,
            metrics=self._router.metrics,
        )

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

    async def ready(self, engines: Collection[EngineRef] = (), timeout_s: float = 60.0) -> None:
        """Returns when every model has a place to go and all of `engines` are connected. Raises EngineLost after
        `timeout_s`.
        """
        missing = set(engines)
        try:
            async with asyncio.timeout(timeout_s):
                while missing or not all(self._router.is_ready(name) for name in self._names):
                    await asyncio.sleep(READY_POLL_S)
                    missing -= {session.info.ref for session in self._router.view.sessions() if session.is_ready}
        except TimeoutError:
            names = ", ".join(sorted(ref.engine_id for ref in missing)) or "no decode engine"
            raise EngineLost(f"within {timeout_s:g} s the router did not reach {names}") from None

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, let running requests end for `grace_s` seconds, cancel the rest. Once."""
        if self._is_draining:
            return
        self._is_draining = True
        await self._listener.stop(grace_s)
        await self._router.stop()
        flush_tracing()

    def _end_in_order(self, loop: asyncio.AbstractEventLoop) -> None:
        """At SIGTERM, in a thread: running requests end; Serve makes another replica when the process is gone."""
        grace_s = self._settings.drain_grace_s
        asyncio.run_coroutine_threadsafe(self.drain(grace_s), loop).result(grace_s + SHUTDOWN_MARGIN_S)

    async def __del__(self) -> None:
        """Serve awaits it before it ends a replica."""
        await self.drain(self._settings.drain_grace_s)

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion, whole: the body and the answer of POST /v1/chat/completions. Raises its errors."""
        return await self._post("/v1/chat/completions", body)

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A text completion, whole: the body and the answer of POST /v1/completions. Raises its errors."""
        return await self._post("/v1/completions", body)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("stream"):
            raise InvalidRequest("streaming goes through HTTP; a handle call returns the whole answer", "stream")
        status, answer = await post_json(self._own_app, path, json.dumps(body).encode())
        if status != 200:
            error = answer["error"]
            raise error_from_code(error.get("code") or "internal_error", error["message"])
        return answer


@serve.deployment(
    name="Pools",
    num_replicas=1,
    health_check_period_s=5,
    health_check_timeout_s=10,
    max_constructor_retry_count=1,
    ray_actor_options={"num_cpus": 0},
)
class PoolsDeployment:
    """The engines of an app of `build`. A replica that dies leaves them running, and the next one takes them over."""

    async def __init__(self, config: DiptychConfig) -> None:  # type: ignore[misc] # Serve awaits it
        from diptych.cluster.control.deploy import PoolsKeeper

        logging.getLogger("diptych").setLevel(logging.INFO)
        self._keeper = PoolsKeeper(config)
        folders = await self._keeper.start()
        self._plan = router_plan(config, folders)

    async def router_plan(self) -> RouterPlan:
        """For Router."""
        return self._plan

    async def __del__(self) -> None:
        """Serve awaits it when the app is deleted, updated or shut down."""
        await self._keeper.stop()


def router_plan(config: DiptychConfig, folders: Mapping[str, ModelFolder]) -> RouterPlan:
    """What a router replica of this configuration is told; `folders` by model name."""
    models = tuple(
        RoutedModel(name=name, folder=folders[name], max_context_tokens=settings.max_context_tokens, seed=settings.seed)
        for name, settings in config.models.items()
    )
    return RouterPlan(
        settings=config.router,
        models=models,
        security=config.security,
        trace_file=config.telemetry.trace_file,
        faults=config.faults,
    )


def build(args: dict[str, Any]) -> Application:
    """The app for `import_path: diptych.cluster.entry:build`; name it `diptych`.

    `args` is `{config: FILE}` or what such a file holds. Where it sets no router.port, the router's own listener takes
    a free one: 8000 is Serve's. Raises StartupError for a wrong configuration.
    """
    if "config" in args:
        if len(args) > 1:
            raise StartupError(
                f"args: config names a file, and {', '.join(sorted(set(args) - {'config'}))} stand beside it"
            )
        config = load_config(Path(args["config"]))
    else:
        config = check_config(args, "args")
    foreign = [f"ray.{key}" for key in sorted(config.ray.model_fields_set - {"engine_timeout_s"})]
    foreign += ["router.serve_port"] if "serve_port" in config.router.model_fields_set else []
    if foreign:
        raise StartupError(
            f"{', '.join(foreign)}: these belong to `diptych serve`; a deployment finds Ray and Serve there"
        )
    if "port" not in config.router.model_fields_set:
        config = config.model_copy(update={"router": config.router.model_copy(update={"port": 0})})
    grace_s = config.router.drain_grace_s + SHUTDOWN_MARGIN_S
    pools = cast("Any", PoolsDeployment).options(graceful_shutdown_timeout_s=grace_s).bind(config)
    return cast("Application", cast("Any", RouterDeployment).options(graceful_shutdown_timeout_s=grace_s).bind(pools))


def __getattr__(name: str) -> Application:
    """`diptych.cluster.entry:app` is the app of the default configuration, for `serve build`; made when asked for."""
    if name == "app":
        return build({})
    raise AttributeError(name)
