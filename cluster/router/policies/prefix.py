"""The engine that has most of the prompt cached, while it is not much busier than another."""

from __future__ import annotations

from collections.abc import Sequence

from ..placement import Ask, Choice, EngineLoad, others

MAX_AHEAD = 8  # requests that an engine may have more than the least loaded one and still be chosen for its cache


class Prefix:
    """Longest cached prefix of each role, then least load."""

    name = "prefix"
    sees_caches = True

    def choose(self, ask: Ask, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Choice:
        """See PlacementPolicy."""
        then = self._best(ask, decode)
        rest = others(prefill, then)
        first = self._best(ask, rest) if rest else None
        lacks = ask.lacks(first or then)
        return Choice(first, then, f"prefix: {ask.names.num_tokens - lacks} of {ask.names.num_tokens} tokens cached")

    def _best(self, ask: Ask, engines: Sequence[EngineLoad]) -> EngineLoad:
        limit = min(engine.load for engine in engines) + MAX_AHEAD
        fit = [engine for engine in engines if engine.load <= limit]
        return min(fit, key=lambda engine: (ask.lacks(engine), engine.rank))
