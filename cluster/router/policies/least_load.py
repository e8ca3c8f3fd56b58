"""The engine with the fewest requests."""

from __future__ import annotations

from collections.abc import Sequence

from ..placement import Ask, Choice, EngineLoad, others


class LeastLoad:
    """The least loaded of each role: this router's requests in flight, or what the engine reports if that is more."""

    name = "least_load"
    sees_caches = False

    def choose(self, ask: Ask, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Choice:
        """See PlacementPolicy."""
        then = min(decode, key=lambda engine: engine.rank)
        first = min(others(prefill, then), key=lambda engine: engine.rank, default=None)
        loads = f"{then.load} in work at {then.ref.engine_id}"
        return Choice(first, then, f"least_load: {loads}")
