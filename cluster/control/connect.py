"""For other processes of the same user on the same machine: find a running cluster and join its Ray.

One of `diptych serve` leaves a state file. An app of `serve deploy` is found as Ray's own commands find a cluster.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, cast

from diptych.cluster.config import default_run_dir
from diptych.protos.errors import DiptychError, StartupError
from diptych.protos.status import EngineInfo
from diptych.protos.trust import secret_id
from diptych.protos.types import Role

from .host import is_reachable
from .launch import ray_environment
from .manager import Member
from .plan import ClusterPlan
from .scaled import Scaled
from .state import ClusterState, find_cluster

_CALL_TIMEOUT_S = 20.0


def serve_handle(url: str | None = None, run_dir: Path | None = None) -> Any:
    """The `DeploymentHandle` of the router of the cluster at `url` (None: see `located`).

    Call it before anything else imports ray: Ray reads its authentication from the environment when it is loaded.
    Raises StartupError when no such cluster runs.
    """
    join(located(url, run_dir))
    return _app_handle("diptych")


def deployed_url(address: str) -> str:
    """Where the router of the Serve app on the Ray cluster at `address` listens. Raises StartupError."""
    join(address)
    import ray

    try:
        return str(_app_handle("diptych").url.remote().result(timeout_s=_CALL_TIMEOUT_S))
    except (ray.exceptions.RayError, TimeoutError) as exc:
        raise StartupError(f"the Serve app diptych on the Ray cluster at {address} does not answer: {exc!r}") from exc


def _app_handle(name: str) -> Any:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_app_handle(name)
    except RayServeException as exc:
        raise StartupError(f"the Ray cluster has no Serve app {name}: {' '.join(str(exc).split())[:300]}") from exc


def manager(address: str | None = None, url: str | None = None, run_dir: Path | None = None) -> Any:
    """The PoolManager's handle: of the Ray cluster at `address`, or found as by `serve_handle`. Raises StartupError."""
    where = located(url, run_dir) if address is None else address
    join(where)
    import ray

    from .gcs import NAMESPACE
    from .manager_actor import MANAGER_NAME

    try:
        return ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    except ValueError as exc:
        at = where if isinstance(where, str) else where.ray_address
        raise StartupError(f"no Diptych cluster runs on the Ray cluster at {at}") from exc


def apply(handle: Any, plan: ClusterPlan, *, timeout_s: float) -> Scaled:
    """Give the manager of `handle` another plan and wait until its engines have replaced the others; see Pools.apply
    and Pools.exchanged. Raises StartupError.
    """
    from . import keyring
    from .gcs import GcsStore

    _done(handle.apply.remote(plan.with_secret(secret_id(keyring.fetch(GcsStore())))), timeout_s)
    return cast("Scaled", _done(handle.exchanged.remote(), timeout_s))


def engine_pids(handle: Any, *, timeout_s: float) -> list[int]:
    """Of the engines that routers know. Raises StartupError."""
    _, engines = _done(handle.engines.remote(), timeout_s)
    return [info.pid for info in engines]


def scale(handle: Any, model: str, role: Role, engines: int, *, timeout_s: float) -> Scaled:
    """Ask the manager of `handle` for another pool size and wait; see Pools.scale. Raises its errors, StartupError."""
    return cast("Scaled", _done(handle.scale.remote(model, role, engines), timeout_s))


def restart(handle: Any, model: str | None, role: Role | None, *, timeout_s: float) -> Scaled:
    """Ask the manager of `handle` for other engines and wait; see Pools.restart. Raises its errors, StartupError."""
    # Ray repeats a call when the manager dies under it: what was replaced by then is younger than these.
    known = cast("list[Member]", _done(handle.members.remote(), timeout_s))
    until = max((member.epoch for member in known), default=0)
    return cast("Scaled", _done(handle.restart.remote(model, role, until), timeout_s))


def restart_router(*, timeout_s: float) -> tuple[int, int]:
    """Let another router replica take the place of the one that serves, on the Ray cluster that this process has
    joined; the pids of both. Raises StartupError.
    """
    import ray

    handle = _app_handle("diptych")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it says on the terminal how its handles work
    try:
        old, new = handle.restart.remote().result(timeout_s=timeout_s)
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, StartupError):
            raise exc.cause from exc
        raise
    except (ray.exceptions.RayError, TimeoutError) as exc:
        raise StartupError(f"the router does not answer: {' '.join(str(exc).split())[:300]}") from exc
    return old, new


def set_role(handle: Any, engine: str, role: Role, *, timeout_s: float) -> EngineInfo:
    """Ask the manager of `handle` for another role of an engine and wait; see Pools.set_role. Raises its errors,
    StartupError.
    """
    return cast("EngineInfo", _done(handle.set_role.remote(engine, role), timeout_s))


def _done(reference: Any, timeout_s: float) -> Any:
    import ray

    try:
        done = ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, DiptychError):
            raise exc.cause from exc
        raise
    except ray.exceptions.RayError as exc:
        raise StartupError(f"the pool manager does not answer: {' '.join(str(exc).split())[:300]}") from exc
    return done


def located(url: str | None = None, run_dir: Path | None = None) -> ClusterState | str:
    """The cluster of `diptych serve` that was started last here (at `url`), else, without a `url`, the address of the
    Ray cluster that Ray's own commands would take. Raises StartupError when there is neither.
    """
    state = find_cluster(run_dir or default_run_dir(), url)
    if state is None and url is None and (address := ray_address()) is not None:
        return address
    return state or running_cluster(url, run_dir)


def ray_address() -> str | None:
    """RAY_ADDRESS, else the Ray cluster that `ray start` started last on this machine; None without one.

    Not `auto`, which takes any Ray that runs here, such as that of somebody else's `diptych serve`.
    """
    from ray._private.services import find_bootstrap_address

    address: str | None = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)
    return address


def running_cluster(url: str | None = None, run_dir: Path | None = None) -> ClusterState:
    """What the cluster started last on this machine (at `url`) says of itself. Raises StartupError without one."""
    run_dir = run_dir or default_run_dir()
    state = find_cluster(run_dir, url)
    if state is None:
        raise StartupError(
            f"no cluster of yours runs {f'at {url}' if url else 'here'} (looked in {run_dir}); start `diptych serve`, "
            "or name the file with its run_dir by --config, or, for an app of `serve deploy`, set RAY_ADDRESS"
        )
    return state


def join(where: ClusterState | str) -> None:
    """Connect this process to a Ray cluster, unless it is connected. Raises StartupError."""
    address = where if isinstance(where, str) else where.ray_address
    if isinstance(where, ClusterState) and where.token_path is not None:
        os.environ |= ray_environment(Path(where.token_path))
    import ray

    from .gcs import NAMESPACE

    if ray.is_initialized():
        return
    if "://" not in address and not is_reachable(address):
        raise StartupError(f"nothing answers at {address}, the Ray cluster to ask; check --address or RAY_ADDRESS")
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as exc:
        raise StartupError(f"cannot join the Ray cluster at {address}: {' '.join(str(exc).split())[:300]}") from exc
