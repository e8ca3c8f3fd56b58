"""Every metric of a router replica in one table, in a registry of its own, and the engines' readings beside them.

Engines send gauges and counters in their Status frames; they appear here with the labels engine, role and model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diptych.protos.status import EngineStatus

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = tuple(float(1 << i) for i in range(18))
_CLASS = ("model", "tenant", "path")  # tenant: a configured one or "other"; path: pd, local, or "" before a placement


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One line of the table. Units are part of the name, as Prometheus wants them."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = _LATENCY_S


ROUTER_METRICS: dict[str, MetricSpec] = {
    "requests": MetricSpec(
        "diptych_requests_total",
        "counter",
        "Choices of requests ended, by outcome: ok, cancelled or an error code; what was wrong never became one",
        ("model", "tenant", "outcome"),
    ),
    "http_answers": MetricSpec(
        "diptych_http_answers_total",
        "counter",
        "Answers of the API by route and status; the route is empty where there is none of that path",
        ("route", "status"),
    ),
    "in_flight": MetricSpec("diptych_requests_in_flight", "gauge", "Requests in work"),
    "wrong_transitions": MetricSpec(
        "diptych_wrong_transitions_total",
        "counter",
        "States of requests that followed one that they cannot follow: a defect of the router, please report it",
        ("before", "after"),
    ),
    "waiting": MetricSpec("diptych_requests_waiting", "gauge", "Requests waiting for a place", ()),
    "waiting_limit": MetricSpec("diptych_requests_waiting_limit", "gauge", "Bound of the waiting requests", ()),
    "running_limit": MetricSpec("diptych_requests_running_limit", "gauge", "Bound of the requests in work", ()),
    "ttft": MetricSpec("diptych_ttft_seconds", "histogram", "From the call to the first token", _CLASS),
    "ttst": MetricSpec("diptych_ttst_seconds", "histogram", "From the call to the second token", _CLASS),
    "itl": MetricSpec("diptych_itl_seconds", "histogram", "Between deliveries, per token", _CLASS),
    "e2e": MetricSpec("diptych_e2e_seconds", "histogram", "From the call to the end, however it ended", _CLASS),
    "stage": MetricSpec(
        "diptych_stage_seconds",
        "histogram",
        "Stages of answered requests: queue, route (router), prefill_queue, decode_queue, prefill, decode (engines)",
        ("model", "stage"),
    ),
    "decisions": MetricSpec(
        "diptych_router_decisions_total",
        "counter",
        "Placements by kind and reason; pd, local: policy, pinned, short, no_prefill, colocated; reject: an error code",
        ("model", "kind", "reason"),
    ),
    "fallbacks": MetricSpec(
        "diptych_local_fallbacks_total",
        "counter",
        "Prompts that a decode engine computed because the transfer failed or no prefill engine lived",
        ("model", "cause"),
    ),
    "prompt_tokens": MetricSpec("diptych_prompt_tokens", "histogram", "Prompt length", buckets=_TOKENS),
    "output_tokens": MetricSpec("diptych_output_tokens", "histogram", "Tokens generated", buckets=_TOKENS),
    "prefix_hit_tokens": MetricSpec(
        "diptych_prefix_hit_tokens_total",
        "counter",
        "Prompt tokens found in the prefix cache of the prefill or the decode engine",
        ("model", "where"),
    ),
    "kv_bytes": MetricSpec(
        "diptych_kv_transfer_bytes_total", "counter", "KV that crossed the hinge", ("model", "transport")
    ),
    "kv_seconds": MetricSpec(
        "diptych_kv_transfer_seconds", "histogram", "KV transfer of one request", ("model", "transport")
    ),
    "retries": MetricSpec(
        "diptych_retries_total", "counter", "Further attempts, by the error before", ("model", "code")
    ),
    "migrations": MetricSpec(
        "diptych_migrations_total",
        "counter",
        "Answers that lost an engine after their first token: done (they went on elsewhere) or failed, by the error",
        ("model", "outcome", "cause"),
    ),
    "recovery": MetricSpec(
        "diptych_recovery_seconds",
        "histogram",
        "From a failed attempt to the next token, of requests that went on",
        ("model",),
    ),
    "retry_budget_refused": MetricSpec(
        "diptych_retry_budget_refused_total",
        "counter",
        "Requests that failed because their tenant's retry budget was used up",
        ("model", "tenant"),
    ),
    "disagreements": MetricSpec(
        "diptych_disagreements_total", "counter", "Answers of which two engines told different tokens"
    ),
    "answers_out_of_form": MetricSpec(
        "diptych_answers_out_of_form_total",
        "counter",
        "Complete answers that failed the schema they were asked to match; the client was told",
        ("model",),
    ),
    "quarantined": MetricSpec(
        "diptych_quarantined_total", "counter", "Requests refused from then on because engines died with them"
    ),
    "refused": MetricSpec(
        "diptych_listener_refused_total",
        "counter",
        "Connections and requests that the API turned away before it read them, by error code",
        ("code",),
    ),
    "replicas_before": MetricSpec(
        "diptych_router_replicas_before_total",
        "counter",
        "Router replicas that accepted at this address before this one: handed_over (nothing was refused) or died",
        ("how",),
    ),
    "store_waiting": MetricSpec("diptych_store_waiting", "gauge", "Writes that wait for the store's writer", ()),
    "store_waiting_limit": MetricSpec("diptych_store_waiting_limit", "gauge", "Bound of the waiting writes", ()),
    "store_commit": MetricSpec(
        "diptych_store_commit_seconds", "histogram", "One transaction of the store's writer, its jobs included", ()
    ),
    "store_batch": MetricSpec(
        "diptych_store_batch_writes", "histogram", "Writes that one transaction took in", (), buckets=_TOKENS[:9]
    ),
    "store_failures": MetricSpec(
        "diptych_store_failures_total",
        "counter",
        "Times that the database could not be used, by what was tried: read or write",
        ("kind",),
    ),
    "batches": MetricSpec(
        "diptych_batches", "gauge", "Batches in the store by state; every replica tells the same", ("state",)
    ),
    "batch_lines": MetricSpec(
        "diptych_batch_lines_total", "counter", "Requests of batches that ended here: completed or failed", ("outcome",)
    ),
    "batch_retries": MetricSpec(
        "diptych_batch_retries_total", "counter", "Requests of batches that were tried again, by the error", ("code",)
    ),
    "batch_takeovers": MetricSpec(
        "diptych_batch_takeovers_total", "counter", "Batches taken over from a router that fell silent", ()
    ),
    "background_responses_in_work": MetricSpec(
        "diptych_background_responses_in_work", "gauge", "Background responses that this replica works on", ()
    ),
    "background_responses": MetricSpec(
        "diptych_background_responses_total",
        "counter",
        "Background responses that ended here, by status: completed, incomplete, failed, cancelled",
        ("status",),
    ),
    "files": MetricSpec("diptych_files", "gauge", "Files in the store; every replica tells the same", ()),
    "files_bytes": MetricSpec("diptych_files_bytes", "gauge", "Their bytes", ()),
    "sessions_lost": MetricSpec(
        "diptych_engine_sessions_lost_total", "counter", "Engine streams that broke", ("engine",)
    ),
}

ENGINE_GAUGES: dict[str, tuple[str, Callable[[EngineStatus], float]]] = {
    "diptych_engine_running": ("Requests running", lambda s: s.running),
    "diptych_engine_waiting": ("Requests waiting", lambda s: s.waiting),
    "diptych_engine_transfers": ("Transfers open", lambda s: s.transfers),
    "diptych_engine_ring_slots_busy": ("Staging slots in use", lambda s: s.ring_slots_busy),
    "diptych_engine_blocks_total": ("KV blocks", lambda s: s.blocks.total),
    "diptych_engine_blocks_free": ("KV blocks that hold nothing", lambda s: s.blocks.free),
    "diptych_engine_blocks_cached": ("KV blocks kept for their prefix alone", lambda s: s.blocks.cached),
    "diptych_engine_blocks_used": ("KV blocks of live requests", lambda s: s.blocks.used),
}
# What engines count, by the names in their Status frames.
ENGINE_COUNTERS: dict[str, str] = {
    "engine_steps_total": "Steps of all workers",
    "engine_busy_seconds_total": "Time in steps",
    "engine_outputs_lost_total": "Outputs dropped because nobody read them in time",
    "engine_duplicate_orders_total": "Orders that came twice and were taken once",
    "engine_collector_passes_total": "Passes of Python's garbage collector, which stop all threads",
    "engine_collector_seconds_total": "Time in them",
    "engine_routers_lost_total": "Routers given up because they were silent; their requests were cancelled",
    "engine_refused_calls_total": "Calls of the Engine service turned away: no proof, a wrong one or a wrong role",
    "prefill_requests_total": "Prompts taken",
    "prefill_steps_total": "Prefill steps",
    "prefill_step_seconds_total": "Time in prefill steps",
    "prefill_step_faults_total": "Prefill steps that raised",
    "prefill_request_faults_total": "Prompts that ended because the engine raised while it worked for them alone",
    "decode_request_faults_total": "Requests that ended because the engine raised while it worked for them alone",
    "prefill_row_faults_total": "Prompts that ended because their numbers were not finite",
    "prefill_tokens_total": "Prompt tokens computed",
    "prefill_cached_tokens_total": "Prompt tokens found in the prefix cache",
    "prefill_queued_tokens": "Prompt tokens that wait to be computed",
    "decode_requests_total": "Requests taken",
    "decode_steps_total": "Decode steps",
    "decode_step_seconds_total": "Time in decode steps",
    "decode_step_faults_total": "Decode steps that raised",
    "decode_row_faults_total": "Requests that ended because their numbers were not finite",
    "decode_tokens_total": "Tokens computed, prompts computed here included",
    "decode_generated_tokens_total": "Tokens sampled",
    "decode_cached_tokens_total": "Prompt tokens found in the prefix cache",
    "decode_local_prefills_total": "Prompts that this engine computes itself",
    "decode_preemptions_total": "Requests that gave up their blocks to others and are computed anew",
    "decode_transfer_failures_total": "Requests whose KV did not arrive",
    "decode_running": "Sequences in the steps",
    "decode_kv_tokens": "Tokens whose KV running sequences hold",
    "decode_queued_tokens": "Prompt tokens that wait to be computed",
    "embed_requests_total": "Requests for vectors or scores computed",
    "embed_texts_total": "Texts computed",
    "embed_tokens_total": "Tokens of them",
    "embed_steps_total": "Steps of texts",
    "embed_step_seconds_total": "Time in them",
    "embed_step_faults_total": "Steps of texts that raised",
    "embed_row_faults_total": "Requests that ended because their numbers were not finite",
    "embed_queued_tokens": "Tokens of texts that wait to be computed",
    "kv_transfers_total": "KV transfers completed",
    "kv_transfer_bytes_total": "KV in completed transfers",
    "kv_transfer_failures_total": "KV transfers that failed",
    "kv_transfers_cancelled_total": "KV transfers given up: the client left, or its time was over",
    "kv_fenced_messages_total": "Messages refused because they named another life of an engine",
    "kv_checksum_failures_total": "Chunks that arrived altered",
    "kv_torn_reads_total": "Slots that changed while they were read",
    "kv_fetch_errors_total": "Chunks that could not be fetched",
    "kv_lease_expired_total": "Staged KV given up because its reader went silent",
    "kv_quarantine_timeouts_total": "Slots taken back from a reader that confirmed no abort",
    "kv_refused_calls_total": "Calls of the KV service turned away: no proof, a wrong one or a wrong role",
    "kv_refused_fetches_total": "Fetches turned away: without the capability of their slot",
    "kv_refused_attachments_total": "Attachments to the staging ring turned away: without an invitation",
    "kv_thread_faults_total": "Exceptions in the transfer thread",
    "kv_transport_downgrades_total": "Pairs that fell back to a slower transport",
    "kv_probe_failures_total": "Transports left before their first use: altered bytes, or slow",
    "kv_pair_probed_mib_s": "Speed of the last pair formed, in MiB/s, by a read of known bytes",
    "kv_pairs_lost_total": "Pairs given up because the other engine was silent",
    "kv_unreachable_peers": "Prefill engines that were dialed in vain and are dialed again behind the scenes",
    "kv_unreachable_transfers_total": "Transfers that failed at once because their prefill engine cannot be reached",
    "kv_transports_blamed_total": "Transports left because they altered bytes",
    "kv_pairs_shm_total": "Pairs formed over shared memory",
    "kv_pairs_grpc_total": "Pairs formed over gRPC",
}
_NAME = re.compile(r"[^a-zA-Z0-9_]")


@dataclass(frozen=True, slots=True)
class EngineReading:
    """One engine's last status. `roles` joined by '+'."""

    engine: str
    roles: str
    model: str
    is_up: bool
    status: EngineStatus


class _EngineCollector(Collector):
    def __init__(self, read: Callable[[], Iterable[EngineReading]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()  # names depend on what the engines send; asking at registration would only lock them

    def collect(self) -> Iterable[Metric]:
        labels = ("engine", "role", "model")
        up = GaugeMetricFamily("diptych_engine_up", "Whether the session to the engine is open", labels=labels)
        gauges = {name: GaugeMetricFamily(name, text, labels=labels) for name, (text, _) in ENGINE_GAUGES.items()}
        counted: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for reading in self._read():
            values = (reading.engine, reading.roles, reading.model)
            up.add_metric(values, float(reading.is_up))
            for name, (_, read) in ENGINE_GAUGES.items():
                gauges[name].add_metric(values, read(reading.status))
            for key, value in reading.status.counters.items():
                name = engine_counter_name(key)
                if name not in counted:
                    kind = CounterMetricFamily if key.endswith("_total") else GaugeMetricFamily
                    text = ENGINE_COUNTERS.get(key, f"What engines report as {key}")
                    counted[name] = kind(name, text, labels=labels)
                counted[name].add_metric(values, value)
        yield up
        yield from gauges.values()
        yield from counted.values()


def engine_counter_name(key: str) -> str:
    """The exported name of what an engine counts, without `_total`; without that ending it is a gauge."""
    name = _NAME.sub("_", key).removesuffix("_total").removeprefix("diptych_").removeprefix("engine_")
    return f"diptych_engine_{name}"


class RouterMetrics:
    """The table brought to life. One per router; `render` is the body of /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {key: self._make(spec) for key, spec in ROUTER_METRICS.items()}
        self.counters = {key: metric for key, metric in made.items() if isinstance(metric, Counter)}
        self.gauges = {key: metric for key, metric in made.items() if isinstance(metric, Gauge)}
        self.histograms = {key: metric for key, metric in made.items() if isinstance(metric, Histogram)}

    def _make(self, spec: MetricSpec) -> Counter | Gauge | Histogram:
        if spec.kind == "histogram":
            return Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=self.registry)
        cls = Counter if spec.kind == "counter" else Gauge
        return cls(spec.name, spec.help, spec.labels, registry=self.registry)

    def add_engines(self, read: Callable[[], Iterable[EngineReading]]) -> None:
        """Export the engines' readings too; `read` is called at each scrape."""
        self.registry.register(_EngineCollector(read))

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)
