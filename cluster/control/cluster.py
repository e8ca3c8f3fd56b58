"""One whole cluster: starts it stage by stage and ends it in the reverse order, whatever stage it had reached.

model -> memory plan -> ray -> manager -> socket holder -> engines and serve -> ready
socket holder -> router drains -> serve (on a Ray that is not ours) -> engines -> manager -> driver -> ray
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from diptych.cluster.config import DiptychConfig
from diptych.cluster.engine.card_plan import card_plans
from diptych.cluster.engine.spec import EngineStarted
from diptych.cluster.gateway.check import check_gateway, unpriced
from diptych.cluster.keys import check_exposed
from diptych.cluster.models import ModelFolder, resolve
from diptych.cluster.security import check_security, names_of
from diptych.cluster.security_settings import API_PLAINTEXT
from diptych.cluster.store.schema import prepare_store
from diptych.cluster.tasks import settle_tasks
from diptych.protos.errors import StartupError
from diptych.protos.types import Role

from . import cards, host, keyring
from .holder import SocketHolder, holder_path
from .launch import RayHead, start_ray
from .memory import plan_memory
from .plan import ClusterPlan, num_gpus, plan_cluster
from .state import ClusterState, make_folder, write_config, write_state
from .timeline import Timeline

PROXY_DRAIN_S = 2.0
CALL_TIMEOUT_S = 20.0
_RAISED = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b")  # the last line of a traceback

log = logging.getLogger(__name__)


class Cluster:
    """`start` once, then `stop` once, also after a failed start."""

    def __init__(
        self,
        config: DiptychConfig,
        timeline: Timeline,
        say: Callable[[str], None],
        *,
        on_joined: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_joined` is called right after ray.init, which replaces this process's signal handlers."""
        self._config = config
        self._on_joined = on_joined
        self._timeline = timeline
        self._say = say
        self._folder: Path | None = None
        self._head: RayHead | None = None
        self._manager: Any = None
        self._router: Any = None
        self._holder: SocketHolder | None = None
        self._news: Any = None
        self._num_news = -1
        self._ending = contextlib.ExitStack()  # what to undo, last first
        self.degraded: list[str] = []
        self.of_texts: frozenset[str] = frozenset()  # models that embed or rank

    def start(self) -> ClusterState:
        """Up to the first request that would be answered. Raises StartupError."""
        config, stage = self._config, self._timeline.stage
        check_gateway(config)
        self._check_ports()
        with stage("store"):
            prepare_store(config.store, config.data_dir)
            check_exposed(config)
        with stage("prepare model"):
            folders = {
                name: resolve(
                    settings.source,
                    config.cache_dir,
                    lambda line: self._say(f"    {line}"),
                    echo=settings.echo,
                    has_weights=settings.has_weights,
                )
                for name, settings in config.models.items()
            }
        config = settle_tasks(config, folders)
        check_security(config.security, names_of(config))
        self._folder = folder = make_folder(config.run_dir)
        self._ending.callback(self.remove_folder)
        present = cards.find()
        plan = plan_cluster(config, folders, folder, present=present)
        self.of_texts = frozenset(pool.model for pool in plan.pools if pool.role is Role.EMBED)
        memory = plan_memory(plan.engines(), host.available_memory(), ray_is_ours=config.ray.address is None)
        self._say("\nmemory plan (MiB)")
        self._say(memory.table() + "\n")
        memory.check()
        for table in card_plans(plan.engines(), present.cards):
            self._say(table + "\n")
        with stage("ray"):
            address = self._start_ray(folder, present.count if num_gpus(plan.engines()) else 0)
        if self._head is None:  # our own was given them all
            self._check_gpus(plan)
        with stage("manager"):
            self._start_manager(plan)
        with stage("serve"):
            serve_url = self._start_router(folders, folder)
        with stage("engines") as notes:  # they load while Serve starts; these are the seconds that remain
            started = self._wait_engines(config.ray.engine_timeout_s)
            notes += [_engine_note(engine) for engine in started]
        with stage("ready"):
            refs = [engine.info.ref for engine in started]
            wait_s = config.router.connect_timeout_s * 2
            self._router.ready.remote(refs, wait_s).result(timeout_s=wait_s + CALL_TIMEOUT_S)
            url = self._router.url.remote().result(timeout_s=CALL_TIMEOUT_S)
        for engine in started:
            if engine.memory_plan:
                self._say(f"\n{engine.memory_plan}")
        self.degraded = sorted({choice for engine in started for choice in engine.info.degraded})
        self.degraded += [API_PLAINTEXT] if config.router.leaves_host else []
        self.degraded += unpriced(config.gateway)
        state = ClusterState(
            pid=os.getpid(),
            url=url,
            serve_url=serve_url,
            ray_address=address,
            ray_client_address=None if self._head is None else self._head.client_address,
            token_path=None if self._head is None else str(self._head.token_path),
            folder=str(folder),
            models=tuple(config.models),
        )
        write_config(state, config)
        write_state(state)
        return state

    def poll(self) -> list[str]:
        """Sentences about engines that died or came back since the last call. Raises StartupError when Ray itself is
        gone.
        """
        import ray

        if self._head is not None and self._head.process.poll() is not None:
            raise StartupError(f"Ray ended by itself with code {self._head.process.returncode}; restart the cluster")
        if self._news is None:
            self._news = self._manager.news.remote(self._num_news)
        if not ray.wait([self._news], timeout=0)[0]:
            return []
        news, self._news = self._news, None
        with contextlib.suppress(ray.exceptions.RayError):
            told = ray.get(news)
            self._num_news = max((number for number, _ in told), default=self._num_news)
            return [sentence for _, sentence in told]
        return []

    def stop(self) -> None:
        """Drain and end everything that was started. Never raises."""
        if self._holder is not None:
            self._holder.close()  # or connections would wait for a replica that never comes
        if self._router is not None:
            self._say("draining: no new requests, running ones may finish")
            grace_s = self._config.router.drain_grace_s
            try:
                self._router.drain.remote(grace_s).result(timeout_s=grace_s + PROXY_DRAIN_S)
            except Exception as exc:
                log.warning("the router did not drain: %r", exc)
        while True:
            try:
                self._ending.close()
                return
            except Exception as exc:  # ExitStack has forgotten the callback that raised: go on with the next
                log.warning("while stopping: %r", exc)

    def remove_folder(self) -> None:
        """Sockets, token, state and Ray's session."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _check_ports(self) -> None:
        router = self._config.router
        for option, port in (("port", router.port), ("serve_port", router.serve_port)):
            if port and not host.is_port_free(router.host, port):
                flag = "--port N or " if option == "port" else ""
                raise StartupError(
                    f"port {port} on {router.host} is in use by another program: end that program, or choose another "
                    f"port with {flag}--set router.{option}=N"
                )

    def _start_ray(self, folder: Path, num_gpus: int) -> str:
        address = self._config.ray.address
        if address is None:
            self._head = start_ray(folder, self._config.ray, num_gpus)
            self._ending.callback(self._head.stop)
            address = self._head.address
        elif not host.is_reachable(address):
            raise StartupError(f"nothing answers at {address}, the Ray cluster to join; check ray.address")
        import ray

        from .gcs import NAMESPACE

        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                include_dashboard=False,
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as exc:
            raise StartupError(f"cannot join the Ray cluster at {address}: {' '.join(str(exc).split())[:300]}") from exc
        self._on_joined()
        self._ending.callback(ray.shutdown)
        return str(address)

    def _check_gpus(self, plan: ClusterPlan) -> None:
        from .engines import check_gpus, free_resources

        check_gpus(plan.engines(), free_resources())

    def _start_manager(self, plan: ClusterPlan) -> None:
        import ray

        from .gcs import GcsStore
        from .manager_actor import ensure_manager

        self._manager = ensure_manager()
        self._ending.callback(self._stop_manager)
        plan = plan.with_secret(keyring.deposit(GcsStore(), self._config.security))
        ray.get(self._manager.apply.remote(plan), timeout=CALL_TIMEOUT_S)

    def _wait_engines(self, timeout_s: float) -> tuple[EngineStarted, ...]:
        import ray

        done = ray.get(self._manager.settled.remote(), timeout=timeout_s + CALL_TIMEOUT_S)
        if done.failed:
            raise StartupError("; ".join(done.failed))
        started: tuple[EngineStarted, ...] = done.started
        return started

    def _stop_manager(self) -> None:
        """The router has drained: nothing is left to wait for. Whatever does not end now ends with Ray."""
        import ray

        from .gcs import GcsStore

        release = self._manager.release.options(max_task_retries=0)  # its end is the answer, not a failure
        try:
            ray.get(release.remote("", 0.0), timeout=CALL_TIMEOUT_S)  # False: an app has the engines now
        except ray.exceptions.ActorDiedError:
            pass
        except ray.exceptions.RayError:  # it hangs, or crashed meanwhile
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._manager)
                keyring.withdraw(GcsStore())

    def _start_router(self, folders: dict[str, ModelFolder], folder: Path) -> str:
        from ray import serve

        from diptych.cluster.entry import APP_NAME, RouterDeployment, router_plan, stop_timeout_s

        config = self._config
        # Serve says on this terminal what it does and what it misses while it ends; only errors are of use here.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        port = config.router.serve_port or host.free_ports(1)[0]
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.router.host, "port": port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        if self._head is None:  # our own Ray takes Serve down with it, and other people's apps live on theirs
            self._ending.callback(serve.delete, APP_NAME)
        holder = SocketHolder(holder_path(folder))
        holder.start()
        self._holder = holder
        router = cast("Any", RouterDeployment).options(graceful_shutdown_timeout_s=stop_timeout_s(config))
        plan = router_plan(config, folders, holder.path)
        try:
            self._router = serve.run(router.bind(plan), name=APP_NAME, route_prefix="/")
        except RuntimeError as exc:
            raise StartupError(f"the router did not start: {_of_serve(exc)}", str(exc)) from exc
        return f"http://{config.router.host}:{port}"


def _of_serve(failure: RuntimeError) -> str:
    """Why the deployment failed: Serve's error says that it did, its status has the replica's own last line."""
    from ray import serve

    from diptych.cluster.entry import APP_NAME

    app = serve.status().applications.get(APP_NAME)
    told = [one.message for one in app.deployments.values()] if app is not None else []
    lines = [line.strip() for message in told for line in message.splitlines() if line.strip()]
    causes = [line for line in lines if _RAISED.match(line)]
    return " ".join((causes or lines or [str(failure)])[-1].split())[-600:]


def _engine_note(engine: EngineStarted) -> str:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in engine.timeline)
    return f"{engine.info.ref.engine_id} (pid {engine.info.pid}, {engine.info.dtype}): {parts}"
