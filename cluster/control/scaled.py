"""What a change of pools did, as the manager tells it to whoever asked. Crosses Ray by pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diptych.cluster.engine.spec import EngineStarted
from diptych.protos.types import EngineId

from .life import Life


@dataclass(frozen=True, slots=True)
class Scaled:
    """Engines that serve, what kept others from it, and engines that were asked to end and did."""

    started: tuple[EngineStarted, ...] = ()
    failed: tuple[str, ...] = ()  # sentences
    ended: tuple[EngineId, ...] = ()

    def __add__(self, other: Scaled) -> Scaled:
        return Scaled(self.started + other.started, self.failed + other.failed, self.ended + other.ended)


def told(lives: Sequence[Life]) -> Scaled:
    """Of lives that have settled."""
    return Scaled(
        started=tuple(life.started for life in lives if life.started is not None),
        failed=tuple(life.failure for life in lives if life.failure),
    )
