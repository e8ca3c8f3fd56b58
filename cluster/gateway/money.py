"""Prices, ledger and cache of a gateway as its settings want them, put together.

Gateway.from_config calls it with books in memory, the HTTP front with those of the store; both start the ledger.
"""

from __future__ import annotations

from dataclasses import replace

from .books import Books, MemoryBooks
from .cache import CachedRoute, ResponseCache
from .devices import DeviceMeter
from .ledger import Ledger
from .money_metrics import MoneyMetrics
from .ports import Ports
from .prices import Prices
from .settings import GatewaySettings


def money_ports(
    settings: GatewaySettings,
    books: Books | None = None,
    *,
    ports: Ports | None = None,
    meter: DeviceMeter | None = None,
    metrics: MoneyMetrics | None = None,
    holder: str = "",
) -> Ports:
    """`ports`, with what they lack: prices, a ledger where there are budgets, limits or `books`, a cache where a route
    has one. `holder` names this router's life in the books.
    """
    known = Ports() if ports is None else ports
    prices = Prices(settings, meter=meter, metrics=metrics)
    ledger = known.ledger
    if ledger is None and (books is not None or settings.budgets or settings.limits):
        ledger = Ledger(
            settings,
            prices,
            MemoryBooks() if books is None else books,
            metrics=metrics,
            clock=known.clock,
            holder=holder,
        )
    cache = cache_of(settings, metrics=metrics, ports=known) if known.cache is None else known.cache
    return replace(
        known,
        prices=known.prices or prices.at_most,
        rates=known.rates or prices.rates,
        ledger=ledger,
        cache=cache,
    )


def cache_of(settings: GatewaySettings, *, metrics: MoneyMetrics | None, ports: Ports) -> ResponseCache | None:
    """None where no route has one."""
    routes = {}
    for name, route in settings.routes.items():
        if route.cache is not None:
            behind = [other for _, names in route.fallbacks for other in names]
            targets = (*(entry.target for entry in route.targets), *behind)
            routes[name] = CachedRoute(settings=route.cache, targets=targets)
    return ResponseCache(settings.cache, routes, metrics=metrics, clock=ports.clock) if routes else None
