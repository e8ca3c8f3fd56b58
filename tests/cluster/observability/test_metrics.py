"""What stands on /metrics: one table, and the engines' own names beside it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diptych.cluster.observability.metrics import (
    ENGINE_COUNTERS,
    ROUTER_METRICS,
    EngineReading,
    MetricSpec,
    RouterMetrics,
)
from diptych.kvtransfer import receiver, sender
from diptych.protos.status import EngineStatus


def reading(engine: str, **counters: float) -> EngineReading:
    return EngineReading(engine, "decode", "m", True, EngineStatus(counters=counters))


def test_what_an_engine_reports_is_a_counter_when_its_name_says_so_and_else_a_gauge() -> None:
    metrics = RouterMetrics()
    metrics.add_engines(
        lambda: [reading("d0", decode_steps_total=5, decode_running=2), reading("d1", decode_running=3)]
    )
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert families["diptych_engine_decode_steps"].type == "counter"
    assert [s.value for s in families["diptych_engine_decode_steps"].samples if s.name.endswith("_total")] == [5]
    running = families["diptych_engine_decode_running"]
    assert running.type == "gauge"
    assert {sample.labels["engine"]: sample.value for sample in running.samples} == {"d0": 2, "d1": 3}


def test_each_count_of_an_engine_says_what_it_counts() -> None:
    metrics = RouterMetrics()
    metrics.add_engines(lambda: [reading("d0", decode_preemptions_total=1, something_new_total=2)])
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    told = families["diptych_engine_decode_preemptions"].documentation
    assert told == ENGINE_COUNTERS["decode_preemptions_total"]
    assert "something_new_total" in families["diptych_engine_something_new"].documentation


def test_what_the_hinge_counts_is_in_the_table() -> None:
    assert {*receiver._COUNTERS, *sender._COUNTERS} <= ENGINE_COUNTERS.keys()


@pytest.mark.parametrize("spec", ROUTER_METRICS.values(), ids=lambda spec: spec.name)
def test_names_carry_the_prefix_and_their_unit(spec: MetricSpec) -> None:
    name, kind = spec.name, spec.kind
    assert name.startswith("diptych_")
    assert name.endswith("_total") == (kind == "counter")
    if kind == "histogram":
        assert name.endswith(("_seconds", "_tokens", "_writes"))
