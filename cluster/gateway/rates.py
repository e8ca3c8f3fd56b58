"""Money in whole nano-dollars (1e-9 US dollars), and what tokens cost at a target's rates.

prices.py finds the rates, ledger.py adds the sums up. Integers, because budgets are kept by conditional updates in SQL:
SQLite has no exact decimals, and a sum of floats depends on its order. 63 bits hold nine thousand million dollars.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Literal

from diptych.protos.replies import Usage

NANOS = 1_000_000_000  # of a dollar
_MEGA = 1_000_000
# override: of diptych.yaml; table: of genai-prices; devices: an own pool's measured time; assumed: one of which nothing
# has been measured yet.
Source = Literal["override", "table", "devices", "assumed"]


def nanos_of(dollars: float | Decimal) -> int:
    """Rounded up, so that nothing costs 0 that has a price."""
    exact = dollars if isinstance(dollars, Decimal) else Decimal(repr(dollars))
    return int((exact * NANOS).to_integral_value(ROUND_CEILING))


def dollars_of(nanos: int) -> Decimal:
    """Exact."""
    return Decimal(nanos) / NANOS


@dataclass(frozen=True, slots=True)
class Rate:
    """Nano-dollars for a million tokens. `tiers`: (more prompt tokens than this, the rate of all then), ascending."""

    base: int
    tiers: tuple[tuple[int, int], ...] = ()

    def at(self, input_tokens: int) -> int:
        """For a request with so many tokens of prompt."""
        found = self.base
        for start, rate in self.tiers:
            if input_tokens > start:
                found = rate
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one target. What is None is charged as the kind of tokens that it is part of; but what a cache keeps for an
    hour, and searches, cost more than that: None is not known there.
    """

    input: Rate
    output: Rate
    source: Source
    cache_read: Rate | None = None
    cache_write: Rate | None = None
    input_audio: Rate | None = None
    output_audio: Rate | None = None
    reasoning: Rate | None = None
    per_request: int = 0  # nano-dollars
    cache_write_1h: Rate | None = None
    web_search: int | None = None  # nano-dollars for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one exchange with one target. `input_nanos` has everything about the prompt, caches included, `request_nanos`
    what searches cost. `unknown`: what was used and has no price, so that all of this is the least that it cost.
    """

    input_nanos: int
    output_nanos: int
    request_nanos: int
    source: Source
    unknown: tuple[str, ...] = ()

    @property
    def nanos(self) -> int:
        """All together."""
        return self.input_nanos + self.output_nanos + self.request_nanos


def cost_at(rates: Rates, usage: Usage) -> Cost | None:
    """None where the tokens of prompt or answer were not told."""
    if usage.input_tokens is None or usage.output_tokens is None:
        return None
    size = usage.input_tokens
    read = min(usage.cache_read_tokens or 0, size)
    written = min(usage.cache_write_tokens or 0, size - read)
    heard = min(usage.input_audio_tokens or 0, size - read - written)
    paid = (size - read - written - heard) * rates.input.at(size)
    long = min(usage.cache_write_1h_tokens or 0, written)
    for number, rate in (
        (read, rates.cache_read),
        (written - long, rates.cache_write),
        (long, rates.cache_write_1h or rates.cache_write),
        (heard, rates.input_audio),
    ):
        if number:
            paid += number * (rate or rates.input).at(size)
    spoken = min(usage.output_audio_tokens or 0, usage.output_tokens)
    thought = min(usage.reasoning_tokens or 0, usage.output_tokens - spoken)
    made = (usage.output_tokens - spoken - thought) * rates.output.at(size)
    for number, rate in ((spoken, rates.output_audio), (thought, rates.reasoning)):
        if number:
            made += number * (rate or rates.output).at(size)
    return Cost(
        input_nanos=-(-paid // _MEGA),
        output_nanos=-(-made // _MEGA),
        request_nanos=rates.per_request + (usage.web_searches or 0) * (rates.web_search or 0),
        source=rates.source,
        unknown=tuple(
            name
            for name, used, has_price in (
                ("cache writes of one hour", long, rates.cache_write_1h is not None),
                ("web searches", usage.web_searches, rates.web_search is not None),
                ("other tools that the provider ran", usage.other_tools, False),
            )
            if used and not has_price
        ),
    )


def most_at(rates: Rates, input_tokens: int, output_tokens: int, *, is_kept_long: bool = False) -> int:
    """Nano-dollars that so many tokens of text can cost, whatever a cache does and however much of it is reasoning.
    `is_kept_long`: the request wants a cache to keep some for an hour.
    """
    written = (rates.cache_write, rates.cache_write_1h if is_kept_long else None)
    dearest_in = max(rate.at(input_tokens) for rate in (rates.input, *written) if rate is not None)
    dearest_out = max(rate.at(input_tokens) for rate in (rates.output, rates.reasoning) if rate is not None)
    total = input_tokens * dearest_in + output_tokens * dearest_out
    return -(-total // _MEGA) + rates.per_request
