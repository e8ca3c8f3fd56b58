"""Which prefill and which decode engine a request gets. Policies are pure and see what the view knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from diptych.protos.types import EngineRef


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A live engine as a policy sees it."""

    ref: EngineRef
    in_flight: int  # phases of this router's requests that the engine works on
    same_role: int  # those of them in the role that is being placed
    reported: int  # requests running and waiting there, other routers' included, as of its last status

    @property
    def load(self) -> int:
        """Requests that a new one would wait beside."""
        return max(self.in_flight, self.reported)


@dataclass(frozen=True, slots=True)
class Placement:
    """The engines of one attempt; without `prefill` the decode engine computes the prompt too."""

    prefill: EngineRef | None
    decode: EngineRef


class PlacementPolicy(Protocol):
    """Chooses among live engines of one model. `decode` is not empty."""

    def choose(self, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Placement:
        """The engines for one attempt."""


class LeastLoad:
    """The engine with the fewest requests of each role; ties go by name, so that the choice is reproducible."""

    def choose(self, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Placement:
        """Never the same engine twice: it needs no handoff to itself."""
        best_decode = min(decode, key=_rank).ref
        others = [engine for engine in prefill if engine.ref.engine_id != best_decode.engine_id]
        return Placement(min(others, key=_rank).ref if others else None, best_decode)


def _rank(engine: EngineLoad) -> tuple[int, int, str]:
    return engine.load, engine.same_role, engine.ref.engine_id
