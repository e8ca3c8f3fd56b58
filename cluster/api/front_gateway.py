"""The gateway of a router replica, put together and started: routes and providers of the configuration, the replica's
own pools, the books of its store, its metrics. Called by entry.py, where a configuration has routes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ledger import Ledger
from diptych.cluster.gateway.metrics import GatewayMetrics
from diptych.cluster.gateway.money import money_ports
from diptych.cluster.gateway.money_metrics import MoneyMetrics
from diptych.cluster.gateway.ports import Ports
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.shared_state import SharedState
from diptych.cluster.gateway.stored_books import StoredBooks
from diptych.cluster.observability.tracing import tracer_if_on
from diptych.cluster.providers.fetch import Fetcher
from diptych.cluster.providers.fetch_settings import FetchSettings
from diptych.cluster.providers.metrics import FetchMetrics
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.cluster.router.router import Router
from diptych.cluster.store.database import Store

from .pool_readings import meter_of
from .pool_target import pool_targets
from .routed import RoutedModels
from .served import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPlan:
    """What of a configuration a gateway is made of. Keys are named in it, and read from the replica's environment."""

    settings: GatewaySettings
    providers: Mapping[str, ProviderSettings] = field(default_factory=dict)
    fetch: FetchSettings = field(default_factory=FetchSettings)


class FrontGateway:
    """Started and stopped with its replica: behind the store's start, before its end."""

    def __init__(
        self,
        plan: GatewayPlan,
        *,
        router: Router,
        models: Iterable[ServedModel],
        store: Store,
        shared: SharedState | None = None,
    ) -> None:
        """`shared`: where the replicas meet; None: this one is alone. Raises StartupError for targets that there are
        not.
        """
        registry = router.metrics.registry
        ports = money_ports(
            plan.settings,
            StoredBooks(store),
            ports=Ports(
                metrics=GatewayMetrics(registry),
                fetcher=Fetcher(plan.fetch, metrics=FetchMetrics(registry)),
                shared=shared,
                tracer=tracer_if_on("diptych.gateway"),
            ),
            meter=meter_of(router),
            metrics=MoneyMetrics(registry),
            holder=f"{router.router_id}/{os.urandom(6).hex()}",
        )
        self._ledger = ports.ledger if isinstance(ports.ledger, Ledger) else None
        self._gateway = Gateway(
            plan.settings,
            Registry.load(plan.providers, os.environ),
            targets=pool_targets(router, models),
            ports=ports,
        )
        self.routes = RoutedModels(self._gateway, router)

    async def start(self) -> None:
        """Budgets are leased from now on. Raises StoreUnavailable."""
        if self._ledger is not None:
            await self._ledger.start()
        await self._gateway.start()

    async def stop(self) -> None:
        """What was spent is in the store; the connections to providers are closed."""
        if self._ledger is not None:
            await self._ledger.stop()
        await self._gateway.aclose()
