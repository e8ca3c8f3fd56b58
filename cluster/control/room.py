"""The memory and the cards that the engines of a cluster take, all their lives and what they have been counted, and
what is left.

Called by Pools before it launches or changes anything; the arithmetic is memory.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diptych.protos.errors import StartupError
from diptych.protos.types import Role

from .life import EngineProcesses, Life
from .manager import PoolManager
from .memory import Available, check_more, check_ring, engine_bytes
from .plan import Pool, num_gpus

Pools = Mapping[tuple[str, Role], Pool]
_ROUNDING = 1e-6  # of parts of a card that add up to a whole


class Taken(NamedTuple):
    """What engines take."""

    memory: int = 0  # bytes of the machine
    gpus: float = 0.0

    def plus(self, pool: Pool, count: int, has_been: Iterable[Role] = ()) -> Taken:
        """With `count` more engines of `pool`."""
        memory = count * engine_bytes(pool.template, has_been=tuple(has_been))
        return Taken(self.memory + memory, self.gpus + count * num_gpus([pool.template]))


class Room:
    """Of the machine that the manager is on."""

    def __init__(self, manager: PoolManager, available: Available, processes: EngineProcesses) -> None:
        self._manager = manager
        self._available = available
        self._processes = processes

    def planned(self, lives: Iterable[Life], pools: Pools) -> Taken:
        """What these lives take when they use all that they may. Of stale ones the present template stands for
        theirs; one that changed its role has the arena that it was made with, and a ring if it ever did prefill.
        """
        has_been = {member.engine_id: member.has_been for member in self._manager.members()}
        taken = Taken()
        for life in lives:
            if life.pool in pools and not life.leave.is_set():
                roles = has_been.get(life.engine_id, ()) or (life.pool[1],)
                pool = pools.get((life.pool[0], roles[0]), pools[life.pool])
                taken = taken.plus(pool, 1, roles)
        return taken

    def check(self, pool: Pool, count: int, planned: Taken) -> None:
        """Raises StartupError unless `count` more engines of `pool` fit beside what is `planned`."""
        more = count * num_gpus([pool.template])
        if more and planned.gpus + more > (have := self._processes.num_gpus()) + _ROUNDING:
            raise StartupError(
                f"not enough cards for {count} more engine{'s' if count > 1 else ''} of {pool.model}: the present ones "
                f"take {planned.gpus:g} of the {have:g} that Ray has, and these need {more:g}. Lower "
                f"models.{pool.model}.gpu_share, use fewer engines, or add a card"
            )
        check_more(pool.template, count, planned.memory, self._pids(), self._available)

    def check_role(self, life: Life, role: Role, pool: Pool, planned: Taken) -> None:
        """Raises StartupError when `life`, of `pool`, would come to use a staging ring that does not fit."""
        [has_been] = [m.has_been for m in self._manager.members() if m.engine_id == life.engine_id]
        if role is Role.PREFILL and role not in has_been:
            check_ring(pool.template, planned.memory, self._pids(), self._available)

    def holds(self, missing: Iterable[tuple[Pool, int]], planned: Taken) -> bool:
        """Whether so many more of each pool fit beside what is `planned`."""
        try:
            for pool, count in missing:
                if count > 0:
                    self.check(pool, count, planned)
                    planned = planned.plus(pool, count)
        except StartupError:
            return False
        return True

    def _pids(self) -> list[int]:
        return [info.pid for info in self._manager.engines() if not info.draining]
