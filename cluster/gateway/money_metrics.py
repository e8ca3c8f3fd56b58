"""What is counted of money, limits and kept answers; one per process, exported beside the gateway's other metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class MoneyMetrics:
    """In the given registry. Budgets, limits and routes are configuration, so the series are bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"diptych_gateway_{name}_total", text, labels, registry=registry)

        self.unpriced = counter(
            "unpriced", "Exchanges whose cost nobody knows, or a part of it: no price, no usage", "target"
        )
        self.spent = counter("spent_dollars", "What exchanges have cost, as far as it is known", "target")
        self.over_budget = counter("over_budget", "Requests beyond a budget; shadow: let through", "budget", "shadow")
        self.over_limit = counter("over_limit", "Requests beyond a limit; shadow: let through", "limit", "shadow")
        self.overspent = counter("overspent_dollars", "What requests cost beyond what was set aside", "budget")
        self.leases = counter("leases", "Leases that were asked for, by outcome: granted, refused, failed", "outcome")
        self.cache = counter("cache", "Requests that a kept answer might serve, by outcome: hit, miss", "outcome")
        self.cache_bytes = Gauge("diptych_gateway_cache_bytes", "Kept answers", registry=registry)
        self.flush = Histogram(
            "diptych_gateway_ledger_flush_seconds", "From a settled request to its row in the store", registry=registry
        )
