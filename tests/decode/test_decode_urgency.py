"""Who is served before whom: classes, seats, preemption for a more urgent newcomer, shares, the watermark."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.decode.admission import Admission
from diptych.decode.decision import Decision
from diptych.decode.preemption import least_urgent
from diptych.decode.residents import Residents
from diptych.decode.sequence import Sequence, State
from diptych.decode.testing import DecodeBench
from diptych.protos.settings import DecodeSettings
from diptych.protos.step import StepPlan
from diptych.protos.types import SamplingParams, TransferKey

PROMPT = list(range(100, 123))


def test_a_more_urgent_transfer_takes_a_seat_and_the_loser_keeps_its_kv() -> None:
    bench = DecodeBench(settings=DecodeSettings(max_running=1))
    penalised = SamplingParams(max_tokens=1, presence_penalty=1.0)
    low = bench.submit(PROMPT, transfer=False, max_tokens=10, priority=1, sampling=penalised)
    for _ in range(3):
        bench.step()
    high = bench.submit(PROMPT[5:], max_tokens=4)
    bench.transfer(high)
    bench.collect()
    had = len(bench.ledger.tokens[low])
    tokens = bench.worker.counters()["decode_tokens_total"]
    for _ in range(3):
        bench.step()
    bench.collect()
    bench.assert_complete(high, first_index=1)
    assert len(bench.ledger.tokens[low]) == had
    bench.run()
    bench.assert_complete(low, first_index=0)
    assert bench.ledger.finishes[low].preemptions == 0
    assert bench.worker.counters()["decode_tokens_total"] == tokens + 3 + 10 - had, "nothing is computed twice"
    bench.assert_idle()


@pytest.mark.parametrize("transfer", [True, False])
def test_a_more_urgent_newcomer_takes_blocks_from_the_least_urgent(transfer: bool) -> None:
    bench = DecodeBench(num_blocks=16)
    keys = [bench.submit([at] * 14, transfer=False, max_tokens=12, priority=at) for at in (1, 3, 2)]
    bench.step()
    assert bench.pool.counts().free < 5
    high = bench.submit(PROMPT[:18], transfer=transfer, max_tokens=6)
    if transfer:
        bench.want(high)
    bench.step()
    assert bench.worker.counters()["decode_preemptions_total"] == 1
    assert bench.worker._sequences[keys[1]].state is State.WAITING, "the lowest class went, and one was enough"
    if transfer:
        bench.commit(high)
    bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=0)
    bench.assert_complete(high, first_index=int(transfer))
    bench.assert_idle()


def test_nobody_gives_way_where_it_would_not_help() -> None:
    bench = DecodeBench(num_blocks=16)
    equal = bench.submit([1] * 34, transfer=False, max_tokens=9)
    low = bench.submit([2] * 14, transfer=False, max_tokens=9, priority=5)
    bench.step()
    high = bench.submit(PROMPT[:10] * 5, transfer=False, max_tokens=3)
    for _ in range(5):
        bench.step()
    bench.collect()
    assert len(bench.ledger.tokens[equal]) == len(bench.ledger.tokens[low]) == 6
    assert bench.worker.counters()["decode_preemptions_total"] == 0
    bench.run()
    for key in (equal, low, high):
        bench.assert_complete(key, first_index=0)
    assert bench.ledger.finishes[low].preemptions == 1, "when its equal had ended, it did help"


def test_within_a_class_whoever_has_begun_goes_on() -> None:
    bench = DecodeBench(num_blocks=9, settings=DecodeSettings(max_running=1))
    first = bench.submit(PROMPT, transfer=False, max_tokens=8)
    bench.step()
    bench.submit(PROMPT[1:], transfer=False, max_tokens=8, deadline=bench.clock() + 1e6)
    for at in range(2, 9):
        bench.step()
        assert len(bench.ledger.tokens[first]) + bench.pipeline.num_outstanding == at


def test_the_lines_keep_classes_deadlines_and_arrival() -> None:
    bench = DecodeBench(settings=DecodeSettings(max_running=1, step_tokens=64))
    orders = [(0, None), (1, None), (0, 1e6), (-1, None), (0, 1e5), (0, None)]
    bench.submit([5], transfer=False, max_tokens=3)
    bench.step()
    keys = [
        bench.submit([at] * 9, transfer=False, max_tokens=1, priority=priority, deadline=deadline)
        for at, (priority, deadline) in enumerate(orders)
    ]
    bench.run()
    order = sorted(keys, key=lambda key: list(bench.ledger.tokens).index(key))
    assert [keys.index(key) for key in order] == [3, 4, 2, 0, 5, 1]


def test_tenants_share_seats_by_weight() -> None:
    """Both wait all the time: what they were charged differs by what may be under way, whoever came first."""
    max_running, cost = 4, 6 + 12
    bench = DecodeBench(settings=DecodeSettings(max_running=max_running), num_blocks=200)
    weights = {"heavy": 3.0, "light": 1.0}
    owner: dict[TransferKey, str] = {}
    for tenant, weight in weights.items():
        for at in range(90):
            prompt = [ord(tenant[0]), at, 1, 1, 1, 1]
            key = bench.submit(prompt, transfer=False, max_tokens=12, tenant=tenant, weight=weight)
            owner[key] = tenant
    bound = (max_running + 2) * cost * sum(1 / weight for weight in weights.values())
    ended = 0
    while len({owner[one.key] for one in bench.worker._scheduler.all.line}) == 2:
        bench.step()
        got = Counter[str]()
        for key, tokens in bench.ledger.tokens.items():
            got[owner[key]] += 6 + len(tokens)
        assert abs(got["heavy"] / 3.0 - got["light"]) <= bound
        ended = len(bench.ledger.finishes)
    assert ended > 90, "long enough to tell"
    bench.run()


def test_a_large_prompt_is_not_held_back_by_a_stream_of_small_ones() -> None:
    bench = DecodeBench(num_blocks=16, settings=DecodeSettings(max_running=8))
    small = [bench.submit([at, 2, 3], transfer=False, max_tokens=6, tenant="small") for at in range(6)]
    bench.step()
    large = bench.submit(PROMPT * 2, transfer=False, max_tokens=3, tenant="large")
    for at in range(200):
        small.append(bench.submit([at, 9, 9], transfer=False, max_tokens=6, tenant="small"))
        bench.step()
        if large in bench.ledger.finishes:
            break
    assert large in bench.ledger.finishes, "the large prompt starved"
    bench.run()
    for key in (large, *small):
        bench.assert_complete(key, first_index=0)


@contextmanager
def watched(bench: DecodeBench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[TransferKey, TransferKey]]]:
    """Checks each move of the scheduler. Yields how often a newcomer took a victim's blocks, by (victim, newcomer)."""
    taken = Counter[tuple[TransferKey, TransferKey]]()
    newcomers: list[Sequence] = []
    real_grow, real_preempt, real_admit = Admission._try_grow, Decision.preempt, Residents.admit

    def try_grow(self: Admission, head: Sequence, decision: Decision) -> bool:
        newcomers.append(head)
        try:
            return real_grow(self, head, decision)
        finally:
            newcomers.pop()

    def preempt(self: Decision, residents: Residents, victim: Sequence) -> None:
        assert victim is least_urgent(residents.victims()), "not the least urgent gave way"
        if newcomers:
            assert victim.place.priority > newcomers[-1].place.priority
            taken[victim.key, newcomers[-1].key] += 1
        real_preempt(self, residents, victim)

    def admit(self: Residents, sequence: Sequence, state: State) -> None:
        counts, reserve = self.pool.counts(), bench.worker._scheduler._admission._reserve
        assert not self.num_holders or counts.free + counts.cached >= reserve, "the watermark was not kept"
        real_admit(self, sequence, state)

    def observe(plan: StepPlan) -> None:
        residents, budget = bench.worker._scheduler.all, bench.worker._scheduler._step_tokens
        served = {row.slot for row in plan.rows}
        going_on = [one for one in residents.running.values() if not one.is_full]
        decoding = {one.slot for one in going_on if one.missing == 1}
        assert decoding <= served, "a decoding sequence was left out of a step"
        assert plan.num_tokens <= budget
        assert plan.num_tokens == budget or {one.slot for one in going_on} == served
        if ready := [one.place.priority for one in residents.ready]:
            assert max(one.place.priority for one in residents.running.values()) <= min(ready), (
                "a seat of a lower class"
            )

    bench.runner.observe = observe
    with monkeypatch.context() as patch:
        patch.setattr(Admission, "_try_grow", try_grow)
        patch.setattr(Decision, "preempt", preempt)
        patch.setattr(Residents, "admit", admit)
        yield taken


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), classes=st.sampled_from([1, 3]))
def test_under_full_load_of_local_prompts_the_rules_hold_at_every_move(seed: int, classes: int) -> None:
    rng = random.Random(seed)
    bench = DecodeBench(
        num_blocks=rng.choice([10, 14, 30]),
        settings=DecodeSettings(
            max_running=rng.choice([1, 4, 16]),
            step_tokens=rng.choice([1, 3, 16, 64]),
            watermark=rng.choice([0.0, 0.01, 0.25]),
        ),
        prefix_cache=rng.random() < 0.7,
    )
    keys: list[TransferKey] = []
    with pytest.MonkeyPatch.context() as monkeypatch, watched(bench, monkeypatch) as taken:
        for _ in range(60):
            prompt = [rng.randrange(3)] * rng.choice([1, 6, 15, 24]) + [rng.randrange(9)]
            max_tokens = rng.choice([1, 5, 14])
            keys.append(bench.submit(prompt, transfer=False, max_tokens=max_tokens, priority=rng.randrange(classes)))
            for _ in range(rng.randrange(4)):
                bench.step()
        bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=0)
    for (victim, newcomer), times in taken.items():
        again = bench.ledger.finishes[newcomer].preemptions
        assert times <= again + 1, f"{newcomer} took the blocks of {victim} {times} times, coming in {again + 1} times"
    if classes == 1 and not bench.pool.prefix_cache:
        assert list(bench.ledger.tokens) == keys, "first tokens come in the order of arrival"
    bench.assert_idle()


def test_a_thousand_local_prompts_of_which_a_fifth_is_cancelled_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    bench = DecodeBench(num_blocks=14, settings=DecodeSettings(max_running=8, step_tokens=24, max_waiting=2000))
    live: list[TransferKey] = []
    cancelled: set[TransferKey] = set()
    with watched(bench, monkeypatch):
        for _ in range(1000):
            prompt = [rng.randrange(3)] * rng.choice([1, 6, 15, 40]) + [rng.randrange(9)]
            live.append(
                bench.submit(
                    prompt,
                    transfer=False,
                    max_tokens=rng.choice([1, 5, 14]),
                    priority=rng.choice([0, 0, 0, 1, -1]),
                    tenant=rng.choice("abc"),
                )
            )
            if rng.random() < 0.2:
                cancelled.add(victim := live.pop(rng.randrange(max(0, len(live) - 12), len(live))))
                bench.cancel(victim)
            for _ in range(rng.randrange(6)):
                bench.step()
        bench.run()
    assert len(cancelled) > 150
    assert bench.worker.counters()["decode_preemptions_total"] > 100
    for key in live:
        bench.assert_complete(key, first_index=0)
    for key in cancelled:
        bench.assert_tokens(key)
    assert len(bench.ledger.finishes) == 1000
    bench.assert_idle()


@pytest.mark.parametrize("watermark", [0.0, 0.01, 0.5])
def test_two_local_prompts_that_exceed_the_pool_together_both_end(watermark: float) -> None:
    bench = DecodeBench(num_blocks=9, settings=DecodeSettings(step_tokens=7, watermark=watermark))
    keys = [bench.submit([at] * 26, transfer=False, max_tokens=9) for at in (1, 2)]
    bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("watermark", [0.0, 0.5])
def test_prompts_of_the_greatest_length_end_one_after_the_other(watermark: float) -> None:
    """The pool holds the context exactly, and no more."""
    settings = DecodeSettings(step_tokens=16, watermark=watermark)
    bench = DecodeBench(num_blocks=12, max_context_tokens=48, settings=settings)
    keys = [bench.submit([at] * 47, transfer=at % 2 == 0, max_tokens=9) for at in range(4)]
    for key in keys[::2]:
        bench.want(key)
    while bench.step() or bench.receiver.transfers:
        for key in [key for key, one in bench.receiver.transfers.items() if one.blocks]:
            bench.commit(key)
    for key in keys:
        assert bench.ledger.finishes[key].num_tokens == 1, "the context is full"
    assert [key in bench.ledger.tokens for key in keys] == [False, True, False, True]
    bench.assert_idle()


def test_gauges_tell_what_is_held_and_what_waits() -> None:
    bench = DecodeBench(settings=DecodeSettings(max_running=2, step_tokens=30))
    bench.submit(PROMPT, transfer=False, max_tokens=4)
    bench.submit(PROMPT[::-1], transfer=False)
    bench.submit([1] * 10, transfer=False)
    bench.submit([2] * 10)
    assert gauges(bench) == (0, 0, 56), "nothing is computed here of what is fetched"
    bench.step()
    bench.collect()
    assert gauges(bench) == (2, 30, 26)
    bench.step()
    bench.collect()
    assert gauges(bench) == (2, 47, 10)
    counters = bench.worker.counters()
    assert (counters["decode_steps_total"], counters["decode_tokens_total"]) == (2, 47)
    assert counters["decode_step_seconds_total"] == 0.0, "the bench's clock stood still"


def gauges(bench: DecodeBench) -> tuple[float, ...]:
    counters = bench.worker.counters()
    return counters["decode_running"], counters["decode_kv_tokens"], counters["decode_queued_tokens"]


def test_who_lost_its_blocks_comes_back_before_any_deadline_of_its_class() -> None:
    bench = DecodeBench(num_blocks=9)
    old = bench.submit(PROMPT[:12], transfer=False, max_tokens=20)
    young = bench.submit(PROMPT[8:20], transfer=False, max_tokens=20)
    bench.step()
    bench.submit([7] * 9, transfer=False, max_tokens=9, deadline=bench.clock() + 1e6)
    while not bench.worker.counters()["decode_preemptions_total"]:
        assert bench.step()
    head = bench.worker._scheduler.all.line.head()
    assert head is not None
    assert head.key == young
    bench.run()
    bench.assert_complete(old, first_index=0)


def test_large_prompts_cost_their_tenant_more_than_small_ones(depth: int) -> None:
    bench = DecodeBench(settings=DecodeSettings(max_running=1))
    sizes = {"large": 30, "small": 3}
    owner: dict[TransferKey, str] = {}
    for at in range(100):
        for tenant, size in sizes.items():
            key = bench.submit([at, size, *range(size - 2)], transfer=False, max_tokens=1, tenant=tenant)
            owner[key] = tenant
    for _ in range(60 * depth):  # the only seat becomes free when its step is collected
        bench.step()
    served = Counter(owner[key] for key in bench.ledger.tokens)
    assert served["small"] > 7 * served["large"], served
    bench.run()
