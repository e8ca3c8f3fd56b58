"""Whose prompt gets blocks and tokens first: classes, deadlines, tenants' shares, arrival."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.prefill.testing import PrefillBench
from diptych.protos.settings import PrefillSettings
from diptych.protos.step import StepPlan
from diptych.protos.testing import echo_reference
from diptych.protos.types import TransferKey

PROMPT = list(range(100, 123))


def test_the_line_keeps_classes_deadlines_and_arrival() -> None:
    bench = PrefillBench(settings=PrefillSettings(max_running=1))
    first = bench.submit(PROMPT)
    bench.step()
    orders = [(0, None), (1, None), (0, 1e6), (-1, None), (0, 1e5), (0, None)]
    keys = [
        bench.submit([at] * 9, priority=priority, deadline=deadline) for at, (priority, deadline) in enumerate(orders)
    ]
    while bench.sender.transfers:
        bench.run()
        bench.release_sent()
    assert [keys.index(key) for key in bench.ledger.tokens if key != first] == [3, 4, 2, 0, 5, 1]
    bench.assert_idle()


def test_a_more_urgent_prompt_gets_the_next_step_though_another_is_in_computation() -> None:
    bench = PrefillBench(settings=PrefillSettings(step_tokens=8))
    low = bench.submit(PROMPT, priority=1)
    bench.step()
    high = bench.submit([7] * 16)
    bench.step()
    bench.step()
    bench.collect()
    assert list(bench.ledger.tokens) == [high]
    bench.run()
    assert bench.ledger.tokens[low] == echo_reference(PROMPT, 1)
    assert [row[1] for plan in bench.trace for row in plan] == [0, 0, 8, 8, 16], "nothing is computed twice"
    bench.release_sent()
    bench.assert_idle()


def test_a_long_prompt_of_one_tenant_does_not_hold_back_another_tenant() -> None:
    """Both are in computation: they take turns by tokens."""
    bench = PrefillBench(settings=PrefillSettings(step_tokens=8), num_blocks=100)
    long = bench.submit([1] * 160, tenant="a")
    bench.step()
    short = bench.submit([2] * 20, tenant="b")
    for _ in range(6):
        bench.step()
    bench.collect()
    assert short in bench.ledger.tokens
    assert long not in bench.ledger.tokens
    bench.run()
    bench.release_sent()
    bench.assert_idle()


def test_within_a_tenant_the_oldest_prompt_is_finished_first() -> None:
    bench = PrefillBench(settings=PrefillSettings(step_tokens=5), num_blocks=100)
    keys = [bench.submit([at] * (30 - at)) for at in range(6)]
    bench.run()
    assert list(bench.ledger.tokens) == keys
    bench.release_sent()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_tenants_that_wait_get_tokens_by_weight(seed: int) -> None:
    """As many prompt tokens are admitted for both, per weight, but for one greatest prompt each."""
    rng = random.Random(seed)
    weights = {"a": 1.0, "b": rng.choice([0.5, 1.0, 4.0])}
    bench = PrefillBench(
        settings=PrefillSettings(max_running=rng.choice([1, 3]), step_tokens=rng.choice([8, 32]), max_waiting=500)
    )
    owner: dict[TransferKey, str] = {}
    for at in range(120):
        tenant = "a" if at < 60 else "b"
        key = bench.submit([at] * rng.randrange(1, 30), tenant=tenant, weight=weights[tenant])
        owner[key] = tenant
    waiting = bench.worker._scheduler.waiting
    bound = 30 * sum(1 / weight for weight in weights.values())
    while {"a", "b"} <= {owner[job.key] for job in waiting}:
        bench.step()
        bench.release_sent()
        got, queued = Counter[str](), {job.key for job in waiting}
        for key, request in bench.requests.items():
            got[owner[key]] += len(request.prompt) if key not in queued else 0
        if {"a", "b"} <= {owner[job.key] for job in waiting}:
            assert abs(got["a"] / weights["a"] - got["b"] / weights["b"]) <= bound
    while bench.run() or bench.sender.transfers:
        bench.release_sent()
    bench.assert_idle()


def test_a_thousand_prompts_of_which_a_fifth_is_cancelled_leave_nothing() -> None:
    rng = random.Random(3)
    bench = PrefillBench(
        num_blocks=24, settings=PrefillSettings(max_running=6, step_tokens=16, max_waiting=2000), slots=4
    )
    trace = bench.runner.observe
    assert trace is not None

    def observe(plan: StepPlan) -> None:
        trace(plan)
        assert plan.num_tokens <= 16
        computing = bench.worker._scheduler.computing
        assert plan.num_tokens == 16 or len(plan.rows) == len(computing), "tokens were left over"
        served = {row.slot for row in plan.rows}
        idle = [job.place.priority for job in computing if job.slot not in served]
        busy = [job.place.priority for job in computing if job.slot in served]
        assert not idle or max(busy) <= min(idle), "a lower class was computed first"

    bench.runner.observe = observe
    live: list[TransferKey] = []
    cancelled: set[TransferKey] = set()
    for _ in range(1000):
        prompt = [rng.randrange(3)] * rng.choice([1, 6, 15, 60]) + [rng.randrange(9)]
        live.append(bench.submit(prompt, priority=rng.choice([0, 0, 1, -1]), tenant=rng.choice("abc")))
        if rng.random() < 0.2:
            cancelled.add(victim := live.pop(rng.randrange(max(0, len(live) - 12), len(live))))
            bench.cancel(victim)
        for _ in range(rng.randrange(5)):
            bench.step()
        if rng.random() < 0.6:
            bench.release_sent()
    while bench.run() or bench.sender.transfers:
        bench.release_sent()
    assert len(cancelled) > 150
    for key in live:
        assert bench.ledger.tokens[key] == echo_reference(bench.requests[key].prompt, 1)
    assert len(bench.ledger.finishes) == 1000
    assert bench.worker.counters()["prefill_cached_tokens_total"] > 500
    bench.assert_idle()


def test_gauges_tell_what_waits_or_is_in_computation() -> None:
    bench = PrefillBench(settings=PrefillSettings(step_tokens=10, max_running=1))
    bench.submit(PROMPT)
    bench.submit(PROMPT)
    queued = []
    for _ in range(3):
        queued.append(bench.worker.counters()["prefill_queued_tokens"])
        bench.step()
    assert queued == [46, 36, 26]
    bench.collect()
    bench.release_sent()
    bench.step()
    assert bench.worker.counters()["prefill_queued_tokens"] == 0, "20 of 23 were cached"
    counters = bench.worker.counters()
    assert counters["prefill_tokens_total"] == 26
    assert counters["prefill_step_seconds_total"] == 0.0, "the bench's clock stood still"
    bench.collect()
    bench.release_sent()
    bench.assert_idle()
