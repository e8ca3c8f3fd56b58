"""protos.status.EngineDirectory over the PoolManager actor, for a router replica. Needs a process connected to Ray."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import ray

from diptych.protos.errors import EngineLost
from diptych.protos.faults import FaultPlan, Point
from diptych.protos.status import EngineInfo

from .faults import pass_point
from .gcs import NAMESPACE
from .manager_actor import MANAGER_NAME, POLL_S

CALL_TIMEOUT_S = 10.0


class ManagerDirectory:
    """Looks the manager up by name on every call after a failure, so that a restarted manager is found."""

    def __init__(self, faults: FaultPlan | None = None) -> None:
        self._faults = faults
        self._manager: Any = None
        self._reader = uuid.uuid4().hex

    async def engines(self) -> tuple[int, list[EngineInfo]]:
        """The present membership and its version. Raises EngineLost when the manager does not answer."""
        version, engines = await self._call("engines", timeout_s=CALL_TIMEOUT_S)
        return version, engines

    async def wait_change(self, version: int) -> tuple[int, list[EngineInfo]]:
        """Returns when the membership is newer than `version`, or after some seconds. Raises EngineLost likewise."""
        version, engines = await self._call("wait_change", version, self._reader, timeout_s=POLL_S + CALL_TIMEOUT_S)
        return version, engines

    async def settled(self) -> None:
        """Returns when every engine of the plan is ready or has failed. Raises EngineLost likewise."""
        waiting = asyncio.ensure_future(self._call("settled", timeout_s=None))
        try:
            while not (await asyncio.wait({waiting}, timeout=POLL_S))[0]:
                await self.engines()  # engines may take minutes to load; a manager that hangs raises here
            await waiting
        finally:
            waiting.cancel()

    async def _call(self, method: str, *args: int | str, timeout_s: float | None) -> Any:
        if self._faults is not None:
            await pass_point(self._faults, Point.MANAGER_LIST, message=method)
        try:
            if self._manager is None:
                self._manager = ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
            reference = getattr(self._manager, method).remote(*args)
            return await asyncio.wait_for(reference, timeout_s)
        except (ray.exceptions.RayError, TimeoutError, ValueError) as exc:
            self._manager = None
            raise EngineLost("the pool manager does not answer", detail=repr(exc)) from exc
