"""What is counted of requests to providers; one per process, handed to the clients. Exported beside the router's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

OUTCOMES = ("answered", "failed", "left")  # left: by who asked, before the end


class ProviderMetrics:
    """The counters, in the given registry. Names hold their units."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"diptych_provider_{name}_total", text, labels, registry=registry)

        self._requests = counter("requests", "Requests to providers that ended, by outcome", "provider", "outcome")
        self._failures = counter("failures", "Requests that failed, by the kind of failure", "provider", "kind")
        self._bytes = counter("bytes", "Bytes of bodies: out (requests) and in (answers)", "provider", "direction")
        self._skipped = counter("skipped_events", "Events of streams that could not be read", "provider")
        self._connections = _Connections()
        registry.register(self._connections)

    def of(self, provider: str, num_connections: Callable[[], int]) -> Counts:
        """A provider's; `num_connections` is asked at each scrape."""
        self._connections.read[provider] = num_connections
        return Counts(
            outcomes={word: self._requests.labels(provider, word) for word in OUTCOMES},
            bytes_out=self._bytes.labels(provider, "out"),
            bytes_in=self._bytes.labels(provider, "in"),
            skipped=self._skipped.labels(provider),
            failed=lambda kind: self._failures.labels(provider, kind).inc(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """One provider's counters."""

    outcomes: dict[str, Counter]
    bytes_out: Counter
    bytes_in: Counter
    skipped: Counter
    failed: Callable[[str], None]


class FetchMetrics:
    """What is held of files behind clients' addresses, in the given registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.held_bytes = Gauge(
            "diptych_fetch_held_bytes", "Bytes set aside for fetched files of requests in work", registry=registry
        )
        self.waiting = Gauge("diptych_fetch_waiting", "Requests that wait for room for their files", registry=registry)
        self.refused = Counter(
            "diptych_fetch_refused_total", "Requests refused because there was no room in time", registry=registry
        )


class _Connections(Collector):
    def __init__(self) -> None:
        self.read: dict[str, Callable[[], int]] = {}

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "diptych_provider_connections", "Open connections, idle ones included", labels=("provider",)
        )
        for provider, read in self.read.items():
            family.add_metric((provider,), float(read()))
        yield family
