"""One time that an engine failed requests: the stream to it was lost, or a step of it raised.

A session makes one and every request that it struck gets the same, so that they are known as company. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diptych.protos.errors import EngineFault
from diptych.protos.types import EngineRef, Finish, FinishReason, Role


@dataclass(frozen=True, eq=False, slots=True)
class Incident:
    """No two are equal. `losses` is the session's count with this one; `hit` names the requests whose step raised, or
    is None when the stream was lost with all that was on it. `nobody_died`: the engine drained, ends, or
    had no word of this router for long.
    """

    engine: EngineRef
    losses: int
    hit: frozenset[bytes] | None = None
    nobody_died: bool = False

    @property
    def is_loss(self) -> bool:
        """Whether only time can tell if the engine has died."""
        return self.hit is None


@dataclass(frozen=True, slots=True)
class Strike:
    """What a request was struck by while it worked as `role`; `is_alone`: no other unproven one was."""

    role: Role
    incident: Incident
    is_alone: bool = False


def raised(engine: EngineRef, losses: int, finishes: Iterable[Finish]) -> Incident | None:
    """Of the ends in one message of `engine`: the step that raised, or None."""
    hit = frozenset(finish.key.transfer_id for finish in finishes if is_fault(finish))
    return Incident(engine, losses, hit) if hit else None


def is_fault(finish: Finish) -> bool:
    """Whether it is the end of a request whose step raised."""
    return finish.reason is FinishReason.ERROR and finish.error_code == EngineFault.code
