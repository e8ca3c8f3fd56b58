"""Tokens and money of calls, as sums, and the prices that the money comes from.

exchange.py and streams.py ask what an attempt used. A price that nobody knows is None, never 0; what is free is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from time import time
from typing import TYPE_CHECKING, Any

from diptych.protos.failures import FailureKind
from diptych.protos.replies import Usage

from .errors import CallFailed, ProviderError, UsageError

if TYPE_CHECKING:
    from diptych.cluster.gateway.price_table import PriceTable
    from diptych.cluster.gateway.rates import Rates
    from diptych.protos.replies import Reply as Answer

    from .draft import Draft
    from .upstream import Upstream

Price = tuple[float, float] | Mapping[str, float]
_PRICES_HOLD_S = 60.0  # some change with the time of day, at full minutes
# Of a failed attempt, nothing is owed: nobody computed anything. The gateway books by the same rule.
_UNPAID = frozenset(FailureKind) - {
    FailureKind.SERVER,
    FailureKind.FIRST_TOKEN_TIMEOUT,
    FailureKind.IDLE_TIMEOUT,
    FailureKind.TOTAL_TIMEOUT,
    FailureKind.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Spent:
    """Of one call or of many. `tokens`: in and out, as far as told; `dollars`: None where nobody knows the price of
    any part of it.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    reasoning_tokens: int = 0
    dollars: Decimal | None = Decimal(0)

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Spent) -> Spent:
        known = self.dollars is not None and other.dollars is not None
        return Spent(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_tokens + other.cache_read_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            (self.dollars or Decimal(0)) + (other.dollars or Decimal(0)) if known else None,
        )


def spent_of(usage: Usage, dollars: Decimal | None) -> Spent:
    """Of one request."""
    return Spent(
        1,
        usage.input_tokens or 0,
        usage.output_tokens or 0,
        usage.cache_read_tokens or 0,
        usage.reasoning_tokens or 0,
        dollars,
    )


def total(parts: Iterable[Spent]) -> Spent:
    """All of them."""
    return sum(parts, Spent())


class PriceList:
    """Prices of a program's own, by reference: `lab/m`, or `lab/*` for all of a prefix. Raises UsageError for a price
    that cannot be.
    """

    def __init__(self, given: Mapping[str, Price]) -> None:
        self._given = {reference: _checked(reference, price) for reference, price in given.items()}
        self._rates: dict[str, Rates] = {}

    def rates(self, reference: str) -> Rates | None:
        """Of a model; None where nothing is said of it."""
        name = reference if reference in self._given else f"{reference.partition('/')[0]}/*"
        if name not in self._given:
            return None
        found = self._rates.get(name)
        if found is None:
            from diptych.cluster.gateway.money_settings import PriceSettings
            from diptych.cluster.gateway.prices import override_rates

            found = self._rates[name] = override_rates(PriceSettings(**self._given[name]))
        return found


_WORDS = (
    "input_per_mtok output_per_mtok cache_read_per_mtok cache_write_per_mtok cache_write_1h_per_mtok per_request "
    "per_web_search"
).split()


def _checked(reference: str, price: Any) -> dict[str, float]:
    place = f"prices[{reference!r}]"
    prefix, _, model = reference.partition("/")
    if not prefix or not model:
        raise UsageError(f"{place}: write PREFIX/MODEL, or PREFIX/* for all of its models", "prices")
    told: Any = price
    if isinstance(price, tuple | list) and len(price) == 2:
        told = {"input_per_mtok": price[0], "output_per_mtok": price[1]}
    if not isinstance(told, Mapping) or not {"input_per_mtok", "output_per_mtok"} <= told.keys():
        raise UsageError(
            f"{place} is {price!r}; it may be a pair of dollars for a million tokens, of prompts and of answers: "
            f"(0.15, 0.6), or a mapping with input_per_mtok and output_per_mtok",
            "prices",
        )
    for name, dollars in told.items():
        if name not in _WORDS:
            raise UsageError(f"{place}: there is no {name!r}; there are {', '.join(_WORDS)}", "prices")
        is_number = isinstance(dollars, int | float) and not isinstance(dollars, bool)
        if not is_number or not 0 <= dollars < math.inf:
            raise UsageError(f"{place}: {name} is {dollars!r}; it may be a number of dollars, 0 or more", "prices")
    return {name: float(dollars) for name, dollars in told.items()}


@cache
def _table() -> PriceTable:
    from diptych.cluster.gateway.price_table import PriceTable

    return PriceTable()


def public_cost(provider: str, model: str, usage: Usage) -> Decimal | None:
    """Dollars by the table of public prices, the same that the gateway books by; None where it does not know the model
    or a part of what was used.
    """
    return _dollars(_public_rates(provider, model, int(time() // _PRICES_HOLD_S)), usage)


@lru_cache(maxsize=256)
def _public_rates(provider: str, model: str, span: int) -> Rates | None:
    return _table().rates(provider, model, span * _PRICES_HOLD_S)


def _dollars(rates: Rates | None, usage: Usage) -> Decimal | None:
    from diptych.cluster.gateway.rates import cost_at, dollars_of

    cost = None if rates is None else cost_at(rates, usage)
    return None if cost is None or cost.unknown else dollars_of(cost.nanos)


def attempt_spent(
    draft: Draft[Any], upstream: Upstream, model: str, answer: Answer | None, error: CallFailed | None = None
) -> Spent:
    """What one attempt of `draft` used: by the registry's own prices, else by the upstream's. Of one that failed, what
    was told before; one that was refused before anything was computed cost 0.
    """
    usage = Usage() if answer is None else answer.usage
    is_told = usage.input_tokens is not None or usage.output_tokens is not None
    if not is_told and isinstance(error, ProviderError) and (answer is None or not answer.message.parts):
        failure = error.failure
        if failure.kind in _UNPAID or failure.status >= 300:
            return spent_of(usage, Decimal(0))
    if not is_told:
        return spent_of(usage, None)
    rates = draft.registry.prices.rates(draft.model)
    return spent_of(usage, upstream.cost(model, usage) if rates is None else _dollars(rates, usage))
