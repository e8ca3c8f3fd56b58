"""Each engine in turn."""

from __future__ import annotations

from collections.abc import Sequence

from ..placement import Ask, Choice, EngineLoad, others


class RoundRobin:
    """A turn per model and role, over the engines by name; whoever is not there is passed over."""

    name = "round_robin"
    sees_caches = False

    def __init__(self) -> None:
        self._turns: dict[tuple[str, str], int] = {}

    def choose(self, ask: Ask, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Choice:
        """See PlacementPolicy."""
        then = self._next(ask.model, "decode", decode)
        rest = others(prefill, then)
        return Choice(self._next(ask.model, "prefill", rest) if rest else None, then, "round_robin: its turn")

    def _next(self, model: str, role: str, engines: Sequence[EngineLoad]) -> EngineLoad:
        turn = self._turns.get((model, role), 0)
        self._turns[model, role] = turn + 1
        return sorted(engines, key=lambda engine: engine.ref.engine_id)[turn % len(engines)]
