"""The Ray shell of the PoolManager: a named detached actor that starts, watches and ends engines, and the routers'
long poll on it. `ensure_manager` finds it or makes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, NoReturn, cast

import ray

from diptych.cluster.observability.logs import log_as_json
from diptych.protos.faults import FaultPlan, FaultSettings, Point, plan_of
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, Role

from . import host, keyring
from .engines import RayEngines
from .faults import pass_point
from .gcs import NAMESPACE, GcsStore
from .manager import Member, PoolManager
from .plan import ClusterPlan
from .pools import Pools
from .readers import Readers
from .scaled import Scaled

MANAGER_NAME = "pool-manager"
POLL_S = 10.0  # a long poll returns after this long at the latest
KNOWN_TIMEOUT_S = 5.0  # a router that has not read a change by then is not waited for


class PoolManagerActor:
    """One per cluster. A restarted one adopts the engines that its store knows."""

    def __init__(self) -> None:
        log_as_json()
        self._store = store = GcsStore()
        self._changed = asyncio.Event()
        self._read = asyncio.Event()
        self._manager = PoolManager(store)
        self._ends = False
        self._readers = Readers(time.monotonic, patience_s=2 * POLL_S)
        self._pools = Pools(
            self._manager,
            store,
            RayEngines(),
            available=host.memory_with,
            changed=self._wake,
            known=self._known,
            reporting=self._reporting,
        )
        self._faults: FaultPlan | None = None

    async def apply(self, plan: ClusterPlan, owner: str | None = None) -> None:
        """See Pools.apply."""
        if self._faults is not None:
            self._faults.close()
        settings = plan.pools[0].template.faults if plan.pools else FaultSettings()  # the same in all of them
        self._faults = plan_of(settings, "manager")
        await self._pools.apply(plan, owner)

    async def settled(self) -> Scaled:
        """See Pools.settled."""
        return await self._pools.settled()

    async def exchanged(self) -> Scaled:
        """See Pools.exchanged."""
        return await self._pools.exchanged()

    async def scale(self, model: str, role: Role, engines: int) -> Scaled:
        """See Pools.scale."""
        return await self._pools.scale(model, role, engines)

    async def restart(self, model: str | None, role: Role | None, until: int | None = None) -> Scaled:
        """See Pools.restart."""
        return await self._pools.restart(model, role, until)

    async def set_role(self, engine: str, role: Role) -> EngineInfo:
        """See Pools.set_role."""
        return await self._pools.set_role(engine, role)

    async def release(self, owner: str, grace_s: float) -> bool:
        """See Pools.release. A manager whose pools were released ends itself, before anybody can apply another plan:
        the caller gets ActorDiedError for True.
        """
        if not await self._pools.release(owner, grace_s):
            return False
        keyring.withdraw(self._store)
        self._ends = True
        self._wake()  # polls: Ray lets what runs come to its end first
        cast("Callable[[], NoReturn]", ray.actor.exit_actor)()

    async def engines(self) -> tuple[int, list[EngineInfo]]:
        """The engines that routers may know, and the version of that list."""
        self._pools.adopt()  # whatever lives: routers ask this first after a restart
        return self._manager.version, self._manager.engines()

    async def wait_change(self, version: int, reader: str) -> tuple[int, list[EngineInfo]]:
        """`engines()` as soon as its version is newer, or after POLL_S. `reader` has taken in `version`."""
        self._readers.note(reader, version)
        self._read.set()
        self._read = asyncio.Event()
        if self._manager.version <= version:
            await self._wait(POLL_S)
        return await self.engines()

    async def members(self) -> list[Member]:
        """All known engines, the dead ones included."""
        return self._manager.members()

    async def news(self, after: int) -> list[tuple[int, str]]:
        """See Pools.news: as soon as there are any, or after POLL_S."""
        deadline = time.monotonic() + POLL_S
        while not (news := self._pools.news(after)) and not self._ends and (left := deadline - time.monotonic()) > 0:
            await self._wait(left)
        return news

    async def _reporting(self, engine_id: EngineId, report: str) -> None:
        if self._faults is not None:
            await pass_point(self._faults, Point.MANAGER_REPORT, peer=engine_id, message=report)

    async def _known(self, version: int) -> None:
        """Until every router that asks has read `version`."""
        deadline = time.monotonic() + KNOWN_TIMEOUT_S
        while self._readers.is_behind(version) and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._read.wait(), left)

    async def _wait(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def ensure_manager() -> Any:
    """The handle of this Ray cluster's manager, which is made where there is none. Needs a connected process."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return (
        cast("Any", ray.remote(PoolManagerActor))
        .options(
            name=MANAGER_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1000,
            scheduling_strategy=here,
        )
        .remote()
    )
