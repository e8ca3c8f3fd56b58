"""What is counted of attempts and of requests; one per process, handed to the gateway. Exported beside the router's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .record import AttemptRecord, ExchangeRecord

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STATES = ("closed", "half_open", "open")  # 0, 1, 2


class GatewayMetrics:
    """The counters, in the given registry. Routes and targets are configuration, so the series are bounded; models that
    clients name directly count as the route `direct` and the target `PROVIDER/*`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"diptych_gateway_{name}_total", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"diptych_gateway_{name}_seconds", text, labels, registry=registry, buckets=_LATENCY_S)

        self._requests = counter("requests", "Requests that ended, by outcome or code of the error", "route", "outcome")
        self._attempts = counter("attempts", "Attempts that ended, by cause and outcome", "target", "cause", "outcome")
        self._failures = counter(
            "failures", "Attempts that failed, by kind and by what was seen", "target", "kind", "phase"
        )
        self._notes = counter(
            "notes", "What targets were asked otherwise than the client asked, or not at all", "target", "kind"
        )
        self._attempt_s = histogram("attempt", "From an attempt's beginning to its end", "target")
        self._first_s = histogram("first_content", "From the request's beginning to its first content", "route")
        self.decisions = counter("rule_decisions", "Requests about which a rule decided", "rule")
        self.state_exchanges = counter(
            "state_exchanges", "Reports to the other routers, by outcome: ok, failed", "outcome"
        )
        self.adopted = counter("adopted_openings", "Breakers that were opened because another router's was", "target")
        self._breakers = _BreakerCollector()
        registry.register(self._breakers)

    def watch(self, states: Callable[[], Mapping[str, str]]) -> None:
        """`states` is asked at each scrape: by target closed, half_open or open."""
        self._breakers.read = states

    def attempted(self, record: AttemptRecord, seconds: float, *, is_direct: bool) -> None:
        """An attempt ended."""
        target = record.target.partition("/")[0] + "/*" if is_direct else record.target
        self._attempts.labels(target, record.cause, record.outcome).inc()
        self._attempt_s.labels(target).observe(seconds)
        for note in record.notes:
            self._notes.labels(target, note.kind).inc()
        if record.failure is not None:
            self._failures.labels(target, record.failure.kind.value, record.phase).inc()

    def exchanged(self, record: ExchangeRecord, *, is_route: bool) -> None:
        """A request ended."""
        route = (record.route or record.model) if is_route else "direct"
        self._requests.labels(route, record.outcome).inc()
        first = next((entry.first_ms for entry in record.attempts if entry.first_ms is not None), None)
        if first is not None:
            self._first_s.labels(route).observe(first / 1000)


class _BreakerCollector(Collector):
    def __init__(self) -> None:
        self.read: Callable[[], Mapping[str, str]] = dict

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("diptych_gateway_breaker_state", "0 closed, 1 half open, 2 open", labels=("target",))
        for target, state in self.read().items():
            family.add_metric((target,), float(_STATES.index(state)))
        yield family
