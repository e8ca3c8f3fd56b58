"""The pair with the least estimated cost: time to the first token, time between tokens, pressure on KV memory.

ttft = (tokens queued at p + tokens that p lacks) / p's rate + tokens that d lacks / the pair's rate
cost = (ttft / its target) ^ 2 + (time between tokens at d / its target) ^ 2 + pressure of d
"""

from __future__ import annotations

from collections.abc import Sequence

from ..estimate import PairMeter
from ..placement import Ask, Choice, EngineLoad, others

PRESSURE_FROM = 0.8  # share of blocks in use above which an engine begins to preempt and to forget prefixes


class Cost:
    """Targets in seconds. A prompt of which d lacks fewer than `local_below` tokens is computed by d."""

    name = "cost"
    sees_caches = True

    def __init__(self, *, ttft_target_s: float, itl_target_s: float, local_below: int, pairs: PairMeter) -> None:
        self._ttft_target_s = ttft_target_s
        self._itl_target_s = itl_target_s
        self._local_below = local_below
        self._pairs = pairs

    def choose(self, ask: Ask, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Choice:
        """See PlacementPolicy."""
        waits = {p.ref: _compute_s(p, ask.lacks(p)) for p in prefill}
        options = []
        for d in decode:
            lacks, itl_s, pressure = ask.lacks(d), _itl_s(ask, d), _pressure(ask, d)
            rest = [] if lacks < self._local_below else others(prefill, d)
            pairs: list[tuple[EngineLoad | None, float]] = [
                (p, waits[p.ref] + lacks / self._pairs.tokens_per_s(p.ref.engine_id, d.ref.engine_id)) for p in rest
            ]
            for p, ttft_s in pairs or [(None, _compute_s(d, lacks))]:
                cost = (ttft_s / self._ttft_target_s) ** 2 + (itl_s / self._itl_target_s) ** 2 + pressure
                options.append((cost, d.rank, p.rank if p else (0, 0, ""), p, d, ttft_s, itl_s))
        _, _, _, first, then, ttft_s, itl_s = min(options, key=lambda option: option[:3])
        return Choice(first, then, f"cost: first token in {ttft_s:.3g} s, then {itl_s:.2g} s each")


def _compute_s(engine: EngineLoad, lacks: int) -> float:
    return (engine.queued_tokens + engine.reserved.prompt_tokens + lacks) / engine.rates.prefill_tokens_per_s


def _itl_s(ask: Ask, engine: EngineLoad) -> float:
    sequences = max(engine.in_flight, engine.sequences + engine.reserved.requests) + 1
    return engine.rates.itl_s(sequences, engine.kv_tokens + engine.reserved.kv_tokens + ask.names.num_tokens)


def _pressure(ask: Ask, engine: EngineLoad) -> float:
    coming = (engine.reserved.kv_tokens + ask.lacks(engine)) / engine.block_tokens
    share = (engine.used_blocks + coming) / engine.num_blocks
    return max(share - PRESSURE_FROM, 0.0) / (1 - PRESSURE_FROM)
