"""The Ray Serve app `diptych`. Its deployment `Router` is one router replica with its own HTTP listener, and the same
ASGI app as Serve's ingress. For Python users of Ray: `serve.get_app_handle("diptych").chat.remote({...})`.

`build` is for `serve run` and `serve deploy` on a Ray cluster that exists: there the deployment `Pools` brings the
engines up and takes them down. torch is never imported in these processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from diptych.cluster.config import DiptychConfig, RouterSettings, SecuritySettings, check_config, load_config
from diptych.cluster.control.sigterm import work_before_sigterm_ends
from diptych.cluster.gateway.check import check_gateway, is_used
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.inprocess import post_json
from diptych.cluster.models import ModelFolder
from diptych.cluster.models.identity import weights_id
from diptych.cluster.models.texts import TextFacts
from diptych.cluster.observability.logs import log_ours_as_json
from diptych.cluster.observability.tracing import configure_tracing, flush_tracing
from diptych.cluster.providers.fetch_settings import FetchSettings
from diptych.cluster.providers.settings import ProviderSettings
from diptych.cluster.store.settings import StoreSettings
from diptych.cluster.tasks import settle_tasks, text_facts
from diptych.protos.errors import EngineLost, InvalidRequest, ShuttingDown, StartupError, error_from_code
from diptych.protos.faults import FaultSettings, plan_of
from diptych.protos.trust import ROUTER
from diptych.protos.types import EngineRef

if TYPE_CHECKING:
    from diptych.cluster.api.front_gateway import FrontGateway
    from diptych.cluster.api.served import ServedModel
    from diptych.cluster.api.text_model import TextModel
    from diptych.cluster.control.held import HeldSocket
    from diptych.cluster.router.router import Router
    from diptych.cluster.store.database import Store

log = logging.getLogger(__name__)

APP_NAME = "diptych"
# Schemas are judged and large bodies parsed in threads: with Python's 5 ms streams would wait that long behind each.
SWITCH_INTERVAL_S = 0.0005
READY_POLL_S = 0.05
SHUTDOWN_MARGIN_S = 15.0
# Of the grace after SIGTERM this much, or half of it, is for running requests when no successor comes.
LAST_REQUESTS_S = 10.0
HOLDER_ANSWERS_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedModel:
    """A model that the router offers."""

    name: str
    folder: ModelFolder
    max_context_tokens: int | None
    seed: int | None
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    weights: str = ""  # see models/identity.py
    text: TextFacts | None = None  # of one that embeds or ranks
    truncate: Literal["none", "start", "end"] = "none"  # its texts, where a request does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPlan:
    """What a replica is told at birth."""

    settings: RouterSettings
    models: tuple[RoutedModel, ...]
    security: SecuritySettings
    holder: Path  # where the listening socket is asked for
    store: StoreSettings
    data_dir: Path
    trace_file: Path | None = None
    faults: FaultSettings = field(default_factory=FaultSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    providers: Mapping[str, ProviderSettings] = field(default_factory=dict)
    fetch: FetchSettings = field(default_factory=FetchSettings)


@serve.deployment(
    name="Router",
    num_replicas=1,
    max_ongoing_requests=10_000,  # admission is the router's own work, with a bounded queue
    max_surge_percent=100,  # an app that is deployed anew keeps its router until the next one accepts
    health_check_period_s=1,  # Serve replaces a replica after the third bad answer, or when its process is gone
    health_check_timeout_s=10,
    max_constructor_retry_count=1,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class RouterDeployment:
    """Composition only: router, app, listener."""

    async def __init__(self, plan: RouterPlan | DeploymentHandle[Any]) -> None:  # type: ignore[misc] # Serve awaits it
        from diptych.cluster.api.app import create_app
        from diptych.cluster.api.served import ServedModel
        from diptych.cluster.api.text_model import TextModel
        from diptych.cluster.batches.runner import BatchRunner
        from diptych.cluster.control.directory import ManagerDirectory
        from diptych.cluster.control.gcs import GcsStore
        from diptych.cluster.control.keyring import fetch
        from diptych.cluster.control.replica_port import keep_port_on_node
        from diptych.cluster.keys import ApiKeys
        from diptych.cluster.router.router import Router
        from diptych.cluster.security import trust_of
        from diptych.cluster.store.database import open_store

        log_ours_as_json()
        keep_port_on_node()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if isinstance(plan, DeploymentHandle):  # of Pools: waits until the engines are ready
            plan = cast("RouterPlan", await plan.router_plan.remote())
        configure_tracing(plan.trace_file, "router")
        models: list[ServedModel | TextModel] = [
            TextModel.load(m.name, m.folder, m.text, truncate=m.truncate)
            if m.text is not None
            else ServedModel.load(
                m.name,
                m.folder,
                max_context_tokens=m.max_context_tokens,
                seed=m.seed,
                tool_format=m.tool_format,
                reasoning_format=m.reasoning_format,
                weights=m.weights,
            )
            for m in plan.models
        ]
        self._names = [model.name for model in models]
        trust = trust_of(plan.security, fetch(GcsStore()), ROUTER)
        faults = plan_of(plan.faults, "router")
        self._router = Router(directory=ManagerDirectory(faults), settings=plan.settings, trust=trust, faults=faults)
        self._store = open_store(plan.store, plan.data_dir, self._router.metrics)
        await self._store.start()
        await self._router.start()
        keys = ApiKeys(plan.security.api_keys, self._store)
        await keys.start()
        self._front = await _front_gateway(plan, self._router, models, self._store)
        routes = None if self._front is None else self._front.routes
        self._app = create_app(self._router, models, keys, store=self._store, routes=routes)
        self._batches = BatchRunner(self._router, models, self._store, routes=routes)
        await self._batches.start()
        # For handles: who calls one holds Ray's token.
        self._own_app = create_app(self._router, models, store=self._store, routes=routes)
        self._settings = plan.settings
        self._draining: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._successor: asyncio.Future[int | None] = loop.create_future()
        work_before_sigterm_ends(lambda: self._end_in_order(loop))
        self._held = await _held_socket(plan)
        await self._listen()

    async def _listen(self) -> None:
        from diptych.cluster.api.listener import start_listener

        settings, held = self._settings, self._held
        if held is not None and not held.is_first:
            # Connections wait or are served by the replica before this one: none is better off with a 503.
            with contextlib.suppress(EngineLost):
                await self.ready(timeout_s=settings.connect_timeout_s)
        self._listener = await start_listener(
            self._app,
            host=settings.host,
            port=settings.port,
            limits=settings.limits,
            metrics=self._router.metrics,
            sock=None if held is None else held.listening(),
        )
        if held is not None:
            for how, count in held.replicas_before.items():
                self._router.metrics.counters["replicas_before"].labels(how).inc(count)
            await held.accepts()
        log.info("router replica %d accepts at %s", os.getpid(), self._listener.url)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Raises, and Serve replaces the replica, when it leaves or takes no connections."""
        if self._leaving is not None:
            raise ShuttingDown("this replica leaves, another should take over")
        if self._draining is None and not self._listener.is_accepting:
            raise ShuttingDown("the listener takes no connections")

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
            names = ", ".join(sorted(ref.engine_id for ref in missing)) or "no engine"
            raise EngineLost(f"within {timeout_s:g} s the router did not reach {names}") from None

    @property
    def _in_work(self) -> bool:
        return bool(self._router.in_flight) or (self._front is not None and bool(self._front.routes.work.num_choices))

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more, let running requests end for `grace_s` seconds, cancel the rest. Once."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._end(grace_s), name="drain")
        await asyncio.shield(self._draining)

    async def _end(self, grace_s: float) -> None:
        await self._batches.stop()
        if self._held is not None:
            await self._held.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        await self._listener.stop(grace_s)
        for app in (self._app, self._own_app):
            await app.state.background.stop(max(end - loop.time(), 0.0))
        await self._router.stop()
        if self._front is not None:
            await self._front.stop()
        await self._store.stop()
        flush_tracing()

    async def restart(self) -> tuple[int, int]:
        """Give way to another replica; the pids of this one and of that one, which accepts now. Raises StartupError
        when none has taken over within router.drain_grace_s.
        """
        if self._held is None:
            raise StartupError("nobody holds the router's socket: it cannot be restarted without refusing connections")
        self._leave(self._settings.drain_grace_s, 2 * self._settings.drain_grace_s)
        successor = await asyncio.shield(self._successor)
        if successor is None:
            raise StartupError("no other router has come up within router.drain_grace_s")
        return os.getpid(), successor

    def _leave(self, patience_s: float, grace_s: float) -> asyncio.Future[None]:
        """From now on not ready, and Serve starts another replica: for `patience_s` this one serves on until that one
        does, and without patience only if one does already. All ends within `grace_s`.
        """
        if self._leaving is None:
            self._app.state.is_leaving = True
            self._leaving = asyncio.create_task(self._give_way(patience_s, grace_s), name="leave")
        return asyncio.shield(self._leaving)

    async def _give_way(self, patience_s: float, grace_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        successor = None
        if self._held is not None and self._draining is None:
            await self._held.leaves()
            successor = await self._held.successor(max(patience_s, HOLDER_ANSWERS_S))
        self._successor.set_result(successor)
        if self._draining is None and (successor is not None or patience_s):
            log.info("router replica %d gives way to %s", os.getpid(), successor or "nobody: no other has come up")
            await self._listener.hand_over(end - loop.time())
            # What came through Serve; its counts are plain numbers.
            while self._in_work and loop.time() < end:  # noqa: ASYNC110
                await asyncio.sleep(READY_POLL_S)
        await self.drain(max(end - loop.time(), 0.0))

    def _end_in_order(self, loop: asyncio.AbstractEventLoop) -> None:
        """At SIGTERM, in a thread: another replica takes over, running requests end, then the process does."""
        grace_s = self._settings.drain_grace_s
        patience_s = 0.0 if self._held is None else grace_s - min(grace_s / 2, LAST_REQUESTS_S)

        async def leave() -> None:
            await self._leave(patience_s, grace_s)

        asyncio.run_coroutine_threadsafe(leave(), loop).result(2 * grace_s + SHUTDOWN_MARGIN_S)

    async def __del__(self) -> None:
        """Serve awaits it before it ends a replica."""
        await self._leave(0.0, self._settings.drain_grace_s)

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


async def _front_gateway(
    plan: RouterPlan, router: Router, models: Sequence[ServedModel | TextModel], store: Store
) -> FrontGateway | None:
    """Started; None where no name leads to it, and then nothing of it is imported."""
    if not is_used(plan.gateway):
        return None
    from diptych.cluster.api.front_gateway import FrontGateway, GatewayPlan
    from diptych.cluster.api.served import ServedModel
    from diptych.cluster.control.gateway_board import ActorState

    front = FrontGateway(
        GatewayPlan(settings=plan.gateway, providers=plan.providers, fetch=plan.fetch),
        router=router,
        models=[model for model in models if isinstance(model, ServedModel)],
        store=store,
        shared=ActorState(),
    )
    await front.start()
    return front


async def _held_socket(plan: RouterPlan) -> HeldSocket | None:
    """None where nobody holds one within reach. Raises StartupError when the address is taken."""
    from diptych.cluster.control.held import HeldSocket

    try:
        return await HeldSocket.ask(plan.holder, plan.settings.host, plan.settings.port)
    except OSError as exc:
        log.warning(
            "nobody holds the listening socket at %s (%s): this replica binds it for itself, and connections are "
            "refused while another takes its place",
            plan.holder,
            exc,
        )
        return None


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
        from diptych.cluster.control.replica_port import keep_port_on_node

        log_ours_as_json()
        keep_port_on_node()
        self._keeper = PoolsKeeper(config)
        folders = await self._keeper.start()
        self._plan = router_plan(config, folders, self._keeper.holder)

    async def router_plan(self) -> RouterPlan:
        """For Router."""
        return self._plan

    async def __del__(self) -> None:
        """Serve awaits it when the app is deleted, updated or shut down."""
        await self._keeper.stop()


def router_plan(config: DiptychConfig, folders: Mapping[str, ModelFolder], holder: Path) -> RouterPlan:
    """What a router replica of this configuration is told; `folders` by model name, `holder` as in SocketHolder."""
    config = settle_tasks(config, folders)
    models = tuple(
        RoutedModel(
            name=name,
            folder=folders[name],
            max_context_tokens=settings.max_context_tokens,
            seed=settings.seed,
            tool_format=settings.tool_format,
            reasoning_format=settings.reasoning_format,
            weights=weights_id(folders[name], computed=settings.computed, has_weights=settings.has_weights),
            text=text_facts(name, settings, folders[name]),
            truncate=settings.embed.truncate,
        )
        for name, settings in config.models.items()
    )
    return RouterPlan(
        settings=config.router,
        models=models,
        security=config.security,
        holder=holder,
        store=config.store,
        data_dir=config.data_dir,
        trace_file=config.telemetry.trace_file,
        faults=config.faults,
        gateway=config.gateway,
        providers=config.providers,
        fetch=config.fetch,
    )


def stop_timeout_s(config: DiptychConfig) -> float:
    """After which Serve kills a replica that it has asked to end; one that waits for its successor takes longest."""
    return 2 * config.router.drain_grace_s + SHUTDOWN_MARGIN_S


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
    check_gateway(config)
    if "port" not in config.router.model_fields_set:
        config = config.model_copy(update={"router": config.router.model_copy(update={"port": 0})})
    timeout_s = stop_timeout_s(config)
    pools = cast("Any", PoolsDeployment).options(graceful_shutdown_timeout_s=timeout_s).bind(config)
    return cast("Application", cast("Any", RouterDeployment).options(graceful_shutdown_timeout_s=timeout_s).bind(pools))


def __getattr__(name: str) -> Application:
    """`diptych.cluster.entry:app` is the app of the default configuration, for `serve build`; made when asked for."""
    if name == "app":
        return build({})
    raise AttributeError(name)
