"""The engines of a Serve app and the socket of its router: what `diptych serve` does for its own Ray, done from inside
a Ray cluster that exists.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import time
import uuid
from pathlib import Path

import ray

from diptych.cluster.config import DiptychConfig
from diptych.cluster.keys import check_exposed
from diptych.cluster.models import ModelFolder, resolve
from diptych.cluster.security import check_security, names_of
from diptych.cluster.store.schema import prepare_store
from diptych.cluster.tasks import settle_tasks
from diptych.protos.errors import StartupError

from . import host, keyring
from .cards import Card, Cards
from .engines import ray_gpus
from .gcs import GcsStore
from .holder import SocketHolder, holder_path
from .manager_actor import ensure_manager
from .memory import plan_memory
from .plan import ClusterPlan, plan_cluster
from .state import make_folder

FOLDER = "deployed"
MANAGER_TIMEOUT_S = 60.0  # the manager of an app that ends is gone, and another one there
MANAGER_PAUSE_S = 0.2

log = logging.getLogger(__name__)


class PoolsKeeper:
    """`start` once, `stop` once. `stop` ends nothing that a later keeper has taken over meanwhile."""

    def __init__(self, config: DiptychConfig) -> None:
        self._config = config
        self._owner = uuid.uuid4().hex
        self._folder: Path | None = None
        self._holder: SocketHolder | None = None

    @property
    def holder(self) -> Path:
        """Where routers on this machine get their listening socket; after `start`."""
        assert self._holder is not None
        return self._holder.path

    async def start(self) -> dict[str, ModelFolder]:
        """Until all engines are ready; the models' folders by name. Raises StartupError, and nothing is left then."""
        config = self._config
        await asyncio.to_thread(prepare_store, config.store, config.data_dir)
        await asyncio.to_thread(check_exposed, config)
        folders = {
            name: await asyncio.to_thread(
                resolve,
                settings.source,
                config.cache_dir,
                log.info,
                echo=settings.echo,
                has_weights=settings.has_weights,
            )
            for name, settings in config.models.items()
        }
        check_security(config.security, names_of(settle_tasks(config, folders)))
        self._folder = make_folder(config.run_dir, FOLDER)
        holder = SocketHolder(holder_path(self._folder, _cluster_name()))
        holder.start()  # first: a router whose holder died looks for this one, and shows it its socket
        self._holder = holder
        try:
            gpus = ray_gpus()  # what the node shows is not what Ray has
            why = "Ray has no GPU: start its nodes with `ray start --num-gpus N`"
            present = Cards((Card("one of Ray's"),) * int(gpus), why_none="" if gpus else why)
            await self._apply(plan_cluster(config, folders, self._folder, present=present))
        except BaseException:
            await self.stop(grace_s=0.0)
            raise
        return folders

    async def stop(self, grace_s: float | None = None) -> None:
        """Let the engines finish what they have, for the configuration's grace unless told otherwise, and end them."""
        grace_s = self._config.router.drain_grace_s if grace_s is None else grace_s
        if self._holder is not None:
            self._holder.close()
        if not await self._release(grace_s):
            return
        if self._folder is not None and not (self._holder is not None and self._holder.path.exists()):  # a later one's
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _apply(self, plan: ClusterPlan) -> None:
        """Until the engines are ready. Raises StartupError."""
        deadline = time.monotonic() + MANAGER_TIMEOUT_S
        while True:
            manager = ensure_manager()
            try:
                _, present = await manager.engines.remote()
                memory = plan_memory(
                    plan.engines(), host.memory_with([info.pid for info in present]), ray_is_ours=False
                )
                log.info("memory plan (MiB)\n%s", memory.table())
                memory.check()
                secret = keyring.deposit(GcsStore(), self._config.security)
                await manager.apply.remote(plan.with_secret(secret), self._owner)
                done = await manager.settled.remote()
            except ray.exceptions.ActorDiedError as exc:  # it was that of an app that has just ended
                if time.monotonic() > deadline:
                    raise StartupError(
                        f"every manager of engines has ended at once for {MANAGER_TIMEOUT_S:.0f} s: another "
                        f"Diptych app on this Ray cluster is being deleted or starts again and again ({exc})"
                    ) from exc
                await asyncio.sleep(MANAGER_PAUSE_S)
                continue
            if done.failed:
                raise StartupError("; ".join(done.failed))
            return

    async def _release(self, grace_s: float) -> bool:
        """False: a later keeper has the engines now, or Ray is going."""
        release = ensure_manager().release.options(max_task_retries=0)  # its end is the answer, not a failure
        while True:
            try:
                return bool(await release.remote(self._owner, grace_s))
            except ray.exceptions.ActorDiedError:  # the manager went with its pools
                return True
            except ray.exceptions.ActorUnavailableError:  # it crashed, and Ray brings it back
                await asyncio.sleep(MANAGER_PAUSE_S)
            except ray.exceptions.RayError:
                return False


def _cluster_name() -> str:
    """Tells Ray clusters of one user on one machine apart."""
    return "-" + hashlib.sha256(ray.get_runtime_context().gcs_address.encode()).hexdigest()[:8]
