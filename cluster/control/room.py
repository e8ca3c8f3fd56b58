"""The memory that the engines of a cluster take, all their lives and what they have been counted, and what is left.

Called by Pools before it launches or changes anything; the arithmetic is memory.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diptych.protos.errors import StartupError
from diptych.protos.types import Role

from .life import Life
from .manager import PoolManager
from .memory import Available, check_more, check_ring, engine_bytes
from .plan import Pool

Pools = Mapping[tuple[str, Role], Pool]


class Room:
    """Of the machine that the manager is on."""

    def __init__(self, manager: PoolManager, available: Available) -> None:
        self._manager = manager
        self._available = available

    def planned(self, lives: Iterable[Life], pools: Pools) -> int:
        """Bytes that these lives take when they use all that they may. Of stale ones the present template stands for
        theirs; one that changed its role has the arena that it was made with, and a ring if it ever did prefill.
        """
        has_been = {member.engine_id: member.has_been for member in self._manager.members()}
        total = 0
        for life in lives:
            if life.pool in pools and not life.leave.is_set():
                roles = has_been.get(life.engine_id, ()) or (life.pool[1],)
                pool = pools.get((life.pool[0], roles[0]), pools[life.pool])
                total += engine_bytes(pool.template, has_been=roles)
        return total

    def check(self, pool: Pool, count: int, planned: int) -> None:
        """Raises StartupError unless `count` more engines of `pool` fit beside `planned` bytes."""
        check_more(pool.template, count, planned, self._pids(), self._available)

    def check_role(self, life: Life, role: Role, pool: Pool, planned: int) -> None:
        """Raises StartupError when `life`, of `pool`, would come to use a staging ring that does not fit."""
        [has_been] = [m.has_been for m in self._manager.members() if m.engine_id == life.engine_id]
        if role is Role.PREFILL and role not in has_been:
            check_ring(pool.template, planned, self._pids(), self._available)

    def holds(self, missing: Iterable[tuple[Pool, int]], planned: int) -> bool:
        """Whether so many more of each pool fit beside `planned` bytes."""
        try:
            for pool, count in missing:
                if count > 0:
                    self.check(pool, count, planned)
                    planned += count * engine_bytes(pool.template)
        except StartupError:
            return False
        return True

    def _pids(self) -> list[int]:
        return [info.pid for info in self._manager.engines() if not info.draining]
