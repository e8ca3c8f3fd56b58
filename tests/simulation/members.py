"""The pool manager of a simulated cluster: the real PoolManager, a store that outlives it, engines that it restarts.

Deaths are told by the kernel at once, silence by a ping that nobody answers. A stopped process may outlive the verdict
for a while: then two lives of one engine run, and the older must be fenced.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from clients import MODEL
from engine import MAX_CONTEXT, SHAPES, SimEngine

from diptych.cluster.control.manager import PoolManager
from diptych.protos.errors import EngineLost, Fenced
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role

if TYPE_CHECKING:
    from world import World

PING_S = 1.5
POLL_S = 10.0


class _Store:
    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def put(self, key: str, value: bytes) -> None:
        self._values[key] = value


class Members:
    """Also the routers' EngineDirectory."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._store = _Store()
        self._manager = PoolManager(self._store)
        self._changed = asyncio.Event()
        self._is_down = False
        self._is_closed = False
        self.lives: dict[EngineRef, SimEngine] = {}
        self.given_up: set[EngineRef] = set()  # lives that the manager has declared dead

    def launch(self, engine_id: str, roles: frozenset[Role], seconds: float) -> None:
        """A new life; it serves after `seconds`."""
        epoch = self._manager.register(EngineId(engine_id), roles, MODEL)
        role = min(roles, key=lambda role: role is Role.DECODE)
        num_blocks, block_tokens = SHAPES[role]
        ref = EngineRef(EngineId(engine_id), epoch, f"sim:{engine_id}-{epoch}")
        info = EngineInfo(
            ref=ref,
            roles=roles,
            model=MODEL,
            pid=epoch,
            host="sim",
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            max_context_tokens=MAX_CONTEXT,
            dtype="float32",
        )

        def begin() -> None:
            engine = self.lives[ref] = SimEngine(self._world, info)
            self._world.note(engine, "began", None, epoch)
            try:
                self._manager.report_ready(info)
            except Fenced:
                engine.kill()
            self._tell()

        self._world.loop.call_later(seconds, begin)

    def current(self, role: Role | None = None) -> list[SimEngine]:
        """Living engines that the manager counts as ready, by name."""
        refs = {info.ref for info in self._manager.engines() if not info.draining}
        return [
            engine
            for ref, engine in sorted(self.lives.items(), key=lambda item: item[0].engine_id)
            if ref in refs and engine.is_alive and (role is None or role in engine.info.roles)
        ]

    def died(self, engine: SimEngine) -> None:
        """The process of `engine` ended unasked: the manager hears of it soon and starts it again."""
        rng = self._world.rng
        self._world.loop.call_later(0.05 * rng.random(), self._replace, engine, "it died")

    def hangs(self, engine: SimEngine) -> None:
        """`engine` was stopped; who answers no ping is given up, replaced, and killed as soon as that is possible."""

        def verdict() -> None:
            if engine.is_stopped and engine.is_alive:
                self._world.loop.call_later(self._world.rng.choice((0.0, 0.0, 2.0)), engine.kill)
                self._replace(engine, "it hung")

        self._world.loop.call_later(PING_S, verdict)

    def _replace(self, engine: SimEngine, reason: str) -> None:
        if self._manager.report_dead(engine.ref.engine_id, engine.ref.epoch, reason):
            self.given_up.add(engine.ref)
            self._tell()
            self.launch(engine.name, engine.info.roles, 0.5 + 0.5 * self._world.rng.random())

    def dismiss(self, engine: SimEngine, grace_s: float) -> None:
        """Scale down: no new requests, some time for the running ones, then the end. Another takes its place."""
        self._manager.report_draining(engine.ref.engine_id, engine.ref.epoch)
        self._tell()
        engine.begin_drain()
        give_up = self._world.loop.time() + grace_s

        def look() -> None:
            if not engine.is_alive:
                return
            if engine.is_busy and self._world.loop.time() < give_up:
                self._world.loop.call_later(0.05, look)
                return
            engine.quit()
            self._manager.report_left(engine.ref.engine_id, engine.ref.epoch)
            self._tell()
            if not self._is_closed:
                self.launch(engine.name, engine.info.roles, 0.2)

        look()

    def restart_manager(self, seconds: float) -> None:
        """The manager's process dies and comes back with what it stored."""
        self._is_down = True

        def back() -> None:
            self._manager = PoolManager(self._store)
            self._is_down = False
            self._tell()

        self._world.loop.call_later(seconds, back)

    def close(self) -> None:
        """Launch nobody any more."""
        self._is_closed = True

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- EngineDirectory

    async def engines(self) -> tuple[int, list[EngineInfo]]:
        if self._is_down:
            raise EngineLost("the pool manager does not answer")
        return self._manager.version, self._manager.engines()

    async def wait_change(self, version: int) -> tuple[int, list[EngineInfo]]:
        if self._manager.version <= version or self._is_down:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return await self.engines()

    async def settled(self) -> None:
        return
