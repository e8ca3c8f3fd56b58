"""For other processes of the same user on the same machine: join a running cluster's Ray."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from diptych.cluster.config import default_run_dir
from diptych.protos.errors import DiptychError, StartupError
from diptych.protos.types import Role

from .launch import ray_environment
from .pools import Scaled
from .state import ClusterState, find_cluster


def serve_handle(url: str | None = None, run_dir: Path | None = None) -> Any:
    """The `DeploymentHandle` of the router of the cluster at `url` (None: the one started last on this machine).

    Call it before anything else imports ray: Ray reads its authentication from the environment when it is loaded.
    Raises StartupError when no such cluster runs.
    """
    join(running_cluster(url, run_dir))
    from ray import serve

    return serve.get_app_handle("diptych")


def manager(address: str | None = None, url: str | None = None, run_dir: Path | None = None) -> Any:
    """The PoolManager's handle: of the Ray cluster at `address`, or found as by `serve_handle`. Raises StartupError."""
    join(running_cluster(url, run_dir) if address is None else address)
    import ray

    from .gcs import NAMESPACE
    from .manager_actor import MANAGER_NAME

    try:
        return ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    except ValueError as exc:
        raise StartupError(f"no Diptych cluster runs on the Ray cluster at {address}") from exc


def scale(handle: Any, model: str, role: Role, engines: int, *, timeout_s: float) -> Scaled:
    """Ask the manager of `handle` for another pool size and wait; see Pools.scale. Raises its errors, StartupError."""
    import ray

    try:
        done: Scaled = ray.get(handle.scale.remote(model, role, engines), timeout=timeout_s)
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, DiptychError):
            raise exc.cause from exc
        raise
    except ray.exceptions.RayError as exc:
        raise StartupError(f"the pool manager does not answer: {' '.join(str(exc).split())[:300]}") from exc
    return done


def running_cluster(url: str | None = None, run_dir: Path | None = None) -> ClusterState:
    """What the cluster started last on this machine (at `url`) says of itself. Raises StartupError without one."""
    run_dir = run_dir or default_run_dir()
    state = find_cluster(run_dir, url)
    if state is None:
        raise StartupError(
            f"no cluster of yours runs {f'at {url}' if url else 'here'} (looked in {run_dir}); start "
            "`diptych serve`, or name the file with that cluster's run_dir by --config"
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
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise StartupError(f"cannot join the Ray cluster at {address}: {' '.join(str(exc).split())[:300]}") from exc
