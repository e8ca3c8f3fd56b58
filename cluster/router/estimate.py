"""How fast an engine is, from the counters in its Status frames, and what was sent to it since the last one.

Estimates only: they start at sane values and serve the cost policy. One event loop; time comes from the caller's clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diptych.protos.status import EngineStatus

RESERVED_S = 2.0  # a request placed so long ago is in the engine's own numbers, or will never be
RESERVED_READINGS = 2  # the first reading after a placement may have been on its way already
MAX_PAIRS = 4096
_SMOOTHING = 0.2  # weight of the newest reading
_MIN_ITL_S = 1e-4


@dataclass(frozen=True, slots=True)
class EngineRates:
    """Seconds per step are base + per_sequence * sequences + per_kv_token * their tokens."""

    prefill_tokens_per_s: float = 2000.0
    base_s: float = 0.01
    per_sequence_s: float = 0.0005
    per_kv_token_s: float = 1e-7

    def itl_s(self, sequences: float, kv_tokens: float) -> float:
        """Time between two tokens of a sequence beside so many."""
        seconds = self.base_s + self.per_sequence_s * sequences + self.per_kv_token_s * kv_tokens
        return max(seconds, _MIN_ITL_S)


@dataclass(slots=True)
class _Reservation:
    expires: float
    prompt_tokens: int
    kv_tokens: int
    readings_left: int = RESERVED_READINGS


@dataclass(frozen=True, slots=True)
class Reserved:
    """What this router sent to an engine since the engine's own numbers were taken."""

    requests: int = 0
    prompt_tokens: int = 0  # to compute
    kv_tokens: int = 0  # to hold


DEFAULT_RATES = EngineRates()
NOTHING_RESERVED = Reserved()


@dataclass(slots=True)
class EngineMeter:
    """One life of an engine."""

    rates: EngineRates = DEFAULT_RATES
    _last: Mapping[str, float] = field(default_factory=dict)
    _reservations: deque[_Reservation] = field(default_factory=deque)

    def read(self, status: EngineStatus) -> None:
        """Learn from a new status."""
        now, before, self._last = status.counters, self._last, status.counters
        for reservation in self._reservations:
            reservation.readings_left -= 1
        if not before:
            return

        def grown(name: str) -> float:
            return now.get(name, 0.0) - before.get(name, 0.0)

        rates = self.rates
        if grown("prefill_step_seconds_total") > 0 < grown("prefill_tokens_total"):
            rates = _learn_prefill(rates, grown("prefill_tokens_total") / grown("prefill_step_seconds_total"))
        steps, seconds = grown("decode_steps_total"), grown("decode_step_seconds_total")
        if steps > 0 < seconds:
            tokens = grown("decode_tokens_total")
            prompt = max(tokens - grown("decode_generated_tokens_total"), 0.0)  # computed here
            sequences = (now.get("decode_running", 0.0) + before.get("decode_running", 0.0)) / 2
            kv_tokens = (now.get("decode_kv_tokens", 0.0) + before.get("decode_kv_tokens", 0.0)) / 2
            share = prompt / tokens if tokens else 0.0
            rates = _learn_mixed(rates, prompt, share, _Steps(steps, seconds, sequences, kv_tokens))
        self.rates = rates

    def reserve(self, now: float, *, prompt_tokens: int, kv_tokens: int) -> None:
        """A request was placed here at `now`."""
        self._reservations.append(_Reservation(now + RESERVED_S, prompt_tokens, kv_tokens))

    def reserved(self, now: float) -> Reserved:
        """All that is not yet in the engine's own numbers."""
        queue = self._reservations
        while queue and (queue[0].readings_left <= 0 or queue[0].expires <= now):
            queue.popleft()
        if not queue:
            return NOTHING_RESERVED
        return Reserved(len(queue), sum(r.prompt_tokens for r in queue), sum(r.kv_tokens for r in queue))


class _Steps(NamedTuple):
    """Decode steps between two readings; means of what they worked on."""

    num: float
    seconds: float
    sequences: float
    kv_tokens: float


def _learn_mixed(rates: EngineRates, prompt: float, share: float, steps: _Steps) -> EngineRates:
    """From steps of which `share` of the tokens were of prompts: what one part does not explain is the other's.

    Each part learns as much as it had of the tokens. An estimate that explains too much leaves the other a quarter of
    its share, so that neither rate runs away.
    """
    sequences = steps.sequences
    if prompt:
        others_s = steps.num * rates.itl_s(sequences, steps.kv_tokens) if sequences else 0.0
        own_s = max(steps.seconds - others_s, steps.seconds * share / 4)
        rates = _learn_prefill(rates, prompt / own_s, share)
    if share < 1 and (sequences or not prompt):
        own_s = max(steps.seconds - prompt / rates.prefill_tokens_per_s, steps.seconds * (1 - share) / 4)
        rates = _learn_step(rates, own_s / steps.num, steps, 1 - share)
    return rates


def _learn_prefill(rates: EngineRates, tokens_per_s: float, weight: float = 1.0) -> EngineRates:
    known = rates.prefill_tokens_per_s
    return replace(rates, prefill_tokens_per_s=known + weight * _SMOOTHING * (tokens_per_s - known))


def _learn_step(rates: EngineRates, step_s: float, steps: _Steps, weight: float) -> EngineRates:
    # Normalised least mean squares over (1, sequences / 16, kv tokens / 4096): online, bounded, and it forgets.
    inputs = (1.0, steps.sequences / 16, steps.kv_tokens / 4096)
    weights = (rates.base_s, rates.per_sequence_s * 16, rates.per_kv_token_s * 4096)
    error = step_s - sum(w * x for w, x in zip(weights, inputs, strict=True))
    gain = weight * _SMOOTHING * error / sum(x * x for x in inputs)
    base, sequence, kv = (max(w + gain * x, 0.0) for w, x in zip(weights, inputs, strict=True))
    return replace(rates, base_s=base, per_sequence_s=sequence / 16, per_kv_token_s=kv / 4096)


class PairMeter:
    """Prompt tokens per second across the hinge, by (prefill engine, decode engine); the latest MAX_PAIRS of them."""

    DEFAULT = 20_000.0

    def __init__(self) -> None:
        self._rates: OrderedDict[tuple[str, str], float] = OrderedDict()

    def tokens_per_s(self, prefill: str, decode: str) -> float:
        """The estimate of one pair."""
        return self._rates.get((prefill, decode), self.DEFAULT)

    def learn(self, prefill: str, decode: str, num_tokens: int, seconds: float) -> None:
        """A transfer of so many prompt tokens took so long."""
        if num_tokens <= 0 or seconds <= 0:
            return
        pair = prefill, decode
        rate = self.tokens_per_s(prefill, decode)
        self._rates[pair] = rate + _SMOOTHING * (num_tokens / seconds - rate)
        self._rates.move_to_end(pair)
        if len(self._rates) > MAX_PAIRS:
            self._rates.popitem(last=False)
