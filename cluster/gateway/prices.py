"""What targets cost: overrides of diptych.yaml first, then public prices, of own pools their devices' time.

The ledger and the strategy lowest_cost ask. A price that nobody knows is None, never 0, and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from decimal import Decimal
from typing import Final

from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Usage

from .devices import DeviceMeter, DeviceTime
from .money_metrics import MoneyMetrics
from .money_settings import MoneySettings, PoolPriceSettings, PriceSettings
from .price_table import PriceTable
from .rates import Cost, Rate, Rates, cost_at, dollars_of, most_at, nanos_of
from .settings import OWN
from .sizes import Size, size_of
from .target import Target

KEPT_S: Final = 60.0  # a price may depend on the time of the day
MAX_KEPT: Final = 4096  # names come from clients where `direct` lets them
# Of a pool of which nothing has been measured yet: as if a request had its engines for itself, and they were slow.
ASSUMED: Final = DeviceTime(input_s=0.001, output_s=0.05)


class Prices:
    """Of one gateway. `now`: seconds since 1970."""

    def __init__(
        self,
        settings: MoneySettings,
        *,
        meter: DeviceMeter | None = None,
        metrics: MoneyMetrics | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.meter = DeviceMeter() if meter is None else meter
        self.output_tokens = settings.assumed_output_tokens
        self._metrics = metrics
        self._now = now
        self._pools = settings.pools
        self._overrides = {name: override_rates(given) for name, given in settings.prices.items()}
        self._table = PriceTable()
        self._kept: dict[str, tuple[float, Rates | None]] = {}

    def load(self) -> None:
        """The table, which else is loaded when it is asked for first, in 0.1 s."""
        self._table.load()

    def rates(self, target: str) -> Rates | None:
        """Of PROVIDER/MODEL or pool/MODEL now; None: nobody knows."""
        provider, _, model = target.partition("/")
        if provider == OWN:
            price = self._pools.get(model)
            return None if price is None else self._of_pool(model, price)
        if (override := self._overrides.get(target) or self._overrides.get(f"{provider}/*")) is not None:
            return override
        now = self._now()
        kept = self._kept.get(target)
        if kept is None or not kept[0] - KEPT_S <= now < kept[0]:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            kept = self._kept[target] = now + KEPT_S, self._table.rates(provider, model, now)
        return kept[1]

    def cost(self, target: str, usage: Usage) -> Cost | None:
        """Of an exchange that used so much; None where the price, or what was used, is not known. Counted then, and
        where only a part of it is.
        """
        rates = self.rates(target)
        cost = None if rates is None else cost_at(rates, usage)
        if (cost is None or cost.unknown) and self._metrics is not None:
            self._metrics.unpriced.labels(target).inc()
        return cost

    def most_nanos(self, target: str, size: Size, output_tokens: int) -> int | None:
        """What a request of this size can cost there, in nano-dollars; None: nobody knows."""
        rates = self.rates(target)
        return (
            None if rates is None else most_at(rates, size.most_tokens, output_tokens, is_kept_long=size.is_kept_long)
        )

    def wanted_tokens(self, request: ChatRequest) -> int:
        """How long its answer may become; what is assumed of one that does not say."""
        wanted = request.wanted_tokens
        return self.output_tokens if wanted is None else wanted[1]

    def at_most(self, target: Target, request: ChatRequest) -> Decimal | None:
        """The same in dollars, as the strategy lowest_cost takes it."""
        most = self.most_nanos(target.name, size_of(request), self.wanted_tokens(request))
        return None if most is None else dollars_of(most)

    def _of_pool(self, model: str, price: PoolPriceSettings) -> Rates:
        measured = self.meter.of(model)
        spent = ASSUMED if measured is None else measured
        dollars_per_s = Decimal(repr(price.per_device_hour)) * price.devices / 3600

        def rate(seconds: float) -> Rate:
            return Rate(nanos_of(dollars_per_s * Decimal(repr(seconds)) * 1_000_000))

        return Rates(
            input=rate(spent.input_s),
            output=rate(spent.output_s),
            cache_read=Rate(0),  # no engine computes them
            source="assumed" if measured is None else "devices",
        )


def override_rates(given: PriceSettings) -> Rates:
    """What a setting says a target costs."""

    def rate(dollars: float | None) -> Rate | None:
        return None if dollars is None else Rate(nanos_of(dollars))

    return Rates(
        input=Rate(nanos_of(given.input_per_mtok)),
        output=Rate(nanos_of(given.output_per_mtok)),
        cache_read=rate(given.cache_read_per_mtok),
        cache_write=rate(given.cache_write_per_mtok),
        cache_write_1h=rate(given.cache_write_1h_per_mtok),
        per_request=nanos_of(given.per_request),
        web_search=None if given.per_web_search is None else nanos_of(given.per_web_search),
        source="override",
    )
