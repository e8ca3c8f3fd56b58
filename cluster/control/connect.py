"""For Python users of Ray on the same machine: join a running cluster and get the router's handle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diptych.cluster.config import default_run_dir
from diptych.protos.errors import StartupError

from .launch import ray_environment
from .state import find_cluster


def connect(url: str | None = None, run_dir: Path | None = None) -> Any:
    """The `DeploymentHandle` of the router of the cluster at `url` (None: the one started last on this machine).

    Call it before anything else imports ray: Ray reads its authentication from the environment when it is loaded.
    Raises StartupError when no such cluster runs.
    """
    state = find_cluster(run_dir or default_run_dir(), url)
    if state is None:
        raise StartupError(
            f"no cluster of yours runs {f'at {url}' if url else 'on this machine'}; start `diptych serve`"
        )
    if state.token_path is not None:
        os.environ |= ray_environment(Path(state.token_path))
    import ray
    from ray import serve

    from .engines import NAMESPACE

    if not ray.is_initialized():
        ray.init(address=state.ray_address, namespace=NAMESPACE, log_to_driver=False)
    return serve.get_app_handle("diptych")
