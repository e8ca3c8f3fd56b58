"""What engines are and tell about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .types import EngineRef, PoolCounts, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """A member of the cluster, as the PoolManager knows it."""

    ref: EngineRef
    roles: frozenset[Role]
    model: str
    pid: int
    host: str
    block_tokens: int
    num_blocks: int
    max_context_tokens: int
    dtype: str
    degraded: tuple[str, ...] = ()  # choices that cost speed, in words
    layout: str = "disaggregated"  # of its model; in `colocated` decode engines compute the prompts, too
    seats: int = 0  # requests that it decodes at once; 0: it does not tell
    draining: bool = False  # its running requests finish, it takes no new ones


NO_BLOCKS_COUNTED = PoolCounts(total=0, free=0, cached=0, used=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A reading of one engine; `counters` by metric name since the engine's start."""

    running: int = 0
    waiting: int = 0
    blocks: PoolCounts = NO_BLOCKS_COUNTED
    transfers: int = 0
    ring_slots_busy: int = 0
    steps: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)


class EngineDirectory(Protocol):
    """Where a router learns which engines live. Versions only grow."""

    async def engines(self) -> tuple[int, list[EngineInfo]]:
        """The present membership, draining engines included, and its version."""

    async def wait_change(self, version: int) -> tuple[int, list[EngineInfo]]:
        """Returns when the membership is newer than `version`, or after some seconds with the present one."""

    async def settled(self) -> None:
        """Returns when every engine that was asked for is a member, or has failed to become one."""
