"""Answers with a guide through a decode engine: masks at every token, tokens that are certain and cost no step.

Guards what goes wrong when tokens come without a sample: KV that was never computed, a block table that did not grow,
a sample under way counted twice, tokens after the end, a guide told of a token that nobody kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest

from diptych.decode.scheduler import DecodeScheduler
from diptych.decode.sequence import State
from diptych.decode.testing import DecodeBench
from diptych.protos.errors import InvalidRequest
from diptych.protos.ports import StepCost
from diptych.protos.settings import DecodeSettings
from diptych.protos.testing import EchoRunner, FakeGuide, GuideRule, echo_reference, talkative
from diptych.protos.types import FinishReason, SamplingParams, TransferKey

PROMPT = list(range(100, 111))  # 11 tokens: 2 full blocks of 4 and a rest
Known = tuple[int, ...]


def runs(*lengths: int, after: int = 1) -> GuideRule:
    """The first run of certain tokens comes after `after` tokens, each later one after one more. All are 9000 and up;
    else ids below 50.
    """

    def rule(known: Known) -> tuple[Collection[int], Known]:
        at = after
        for length in lengths:
            if len(known) == at:
                return range(50), tuple(range(9000 + at, 9000 + at + length))
            at += length + 1
        return range(50), ()

    return rule


def nothing_after(count: int) -> GuideRule:
    return lambda known: (range(50) if len(known) < count else (), ())


def totals(bench: DecodeBench, name: str) -> int:
    return int(bench.worker.counters()[f"decode_{name}_total"])


def come_by_transfer(bench: DecodeBench, key: TransferKey) -> int:
    bench.transfer(key)
    return 1


def come_by_local_prefill(bench: DecodeBench, key: TransferKey) -> int:
    return 0


def come_after_a_failed_transfer(bench: DecodeBench, key: TransferKey) -> int:
    bench.want(key)
    bench.step()
    bench.fail(key)
    return 0


Way = Callable[[DecodeBench, TransferKey], int]
WAYS: list[Way] = [come_by_transfer, come_by_local_prefill, come_after_a_failed_transfer]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("step_tokens", [1, 3, 64])
@pytest.mark.parametrize("way", WAYS)
def test_a_guided_answer_is_what_the_rule_and_the_model_make_of_it(
    way: Way, step_tokens: int, prefix_cache: bool
) -> None:
    for first in range(8):
        bench = DecodeBench(settings=DecodeSettings(step_tokens=step_tokens), prefix_cache=prefix_cache)
        for _ in range(2):  # the second time from the cache, where there is one
            key = bench.submit(
                [first, *PROMPT], max_tokens=40, rule=talkative, transfer=way is not come_by_local_prefill
            )
            bench.transfer(key) if way is come_by_transfer else way(bench, key)
            bench.run()
            bench.assert_complete(key, first_index=int(way is come_by_transfer))
        assert totals(bench, "forced_tokens") > 0
        assert totals(bench, "generated_tokens") == sum(map(len, bench.ledger.tokens.values()))
        bench.assert_idle()


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_certain_tokens_cost_no_steps_of_their_own(length: int, depth: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=30, rule=runs(length, length), transfer=False)
    steps = bench.run()
    bench.assert_complete(key, first_index=0)
    assert totals(bench, "forced_tokens") == 2 * length
    # A step that was launched before the one that told of a run samples the run's first token, which is known.
    assert steps == 30 - 2 * length + 2 * (depth - 1)
    bench.assert_idle()


def test_they_are_told_at_once_and_computed_as_one_row(depth: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=30, rule=runs(5), transfer=False)
    while key not in bench.ledger.tokens:
        bench.step()
    assert bench.ledger.tokens[key] == bench.expected(key)[:6]
    bench.step()
    ((_, start, tokens, *_),) = bench.trace[-1]
    sampled, *certain = bench.expected(key)[:6]
    if depth == 1:
        assert (start, tokens) == (len(PROMPT), (sampled, *certain))
    else:
        assert (start, tokens) == (len(PROMPT) + 1, tuple(certain)), "the sampled one is under way"
    bench.run()
    bench.assert_complete(key, first_index=0)


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("length", [1, 3, 4, 13])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_may_cross_any_edge_of_blocks(num_prompt: int, length: int, after: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT[:num_prompt], max_tokens=25, rule=runs(length, after=after), transfer=False)
    bench.run()
    bench.assert_complete(key, first_index=0)
    assert totals(bench, "forced_tokens") == length
    bench.assert_idle()


@pytest.mark.parametrize("max_tokens", range(3, 12))
@pytest.mark.parametrize("way", WAYS)
def test_max_tokens_may_end_within_a_run(way: Way, max_tokens: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=max_tokens, rule=runs(8, after=2), transfer=way is not come_by_local_prefill)
    first = way(bench, key)
    bench.run()
    bench.assert_complete(key, first_index=first)
    assert bench.ledger.finishes[key].reason is FinishReason.LENGTH
    assert len(bench.ledger.tokens[key]) == max_tokens - first
    bench.assert_idle()


def test_the_context_may_end_within_a_run() -> None:
    bench = DecodeBench(max_context_tokens=len(PROMPT) + 6)
    key = bench.submit(PROMPT, max_tokens=50, rule=runs(8, after=2), transfer=False)
    bench.run()
    assert bench.ledger.tokens[key] == bench.expected(key)[:6]
    assert bench.ledger.finishes[key].reason is FinishReason.LENGTH
    bench.assert_idle()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(6))
def test_a_stop_token_within_a_run_is_the_last_that_anybody_sees(number: int, way: Way) -> None:
    bench = DecodeBench()
    key = bench.submit(
        PROMPT, max_tokens=30, stop=[9001 + number], rule=runs(6), transfer=way is not come_by_local_prefill
    )
    first = way(bench, key)
    bench.run()
    bench.assert_complete(key, first_index=first)
    assert bench.ledger.finishes[key].reason is FinishReason.STOP
    assert bench.ledger.tokens[key][-1] == 9001 + number
    bench.assert_idle()


@pytest.mark.parametrize("length", [1, 2, 5, 6, 9, 20])
def test_a_run_right_behind_the_token_that_came_by_transfer(length: int) -> None:
    """The transfer brought blocks for the prompt alone: the run needs more of them before it has a seat."""
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=30, rule=runs(length))
    bench.transfer(key)
    assert bench.ledger.tokens[key] == bench.expected(key)[1 : 1 + length], "told before any step"
    bench.run()
    bench.assert_complete(key, first_index=1)
    bench.assert_idle()


@pytest.mark.parametrize("max_tokens", [2, 5])
def test_a_run_behind_the_transferred_token_may_be_the_end(max_tokens: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=max_tokens, rule=runs(9))
    bench.transfer(key)
    bench.assert_complete(key, first_index=1)
    assert bench.run() == 0
    bench.assert_idle()


@pytest.mark.parametrize("resume_within_run", [False, True])
def test_a_cut_answer_goes_on_as_it_was(resume_within_run: bool) -> None:
    rule = runs(5, 7, 3, after=2) if resume_within_run else talkative
    whole = echo_reference(PROMPT, 30, rule=rule)
    for cut in range(29):
        for way in WAYS:
            bench = DecodeBench()
            key = bench.submit(
                PROMPT, max_tokens=30, rule=rule, resume=tuple(whole[:cut]), transfer=way is not come_by_local_prefill
            )
            first = cut + way(bench, key)
            bench.run()
            assert bench.expected(key) == whole
            bench.assert_complete(key, first_index=first)
            bench.assert_idle()


def test_the_next_attempt_goes_on_from_what_was_told() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=30, rule=talkative)
    bench.transfer(key)
    whole = bench.expected(key)
    for _ in range(6):
        bench.step()
    bench.cancel(key)
    bench.run()
    told = 1 + len(bench.ledger.tokens[key])
    again = bench.again(key, whole[:told])
    bench.transfer(again)
    bench.run()
    bench.assert_complete(again, first_index=told + 1)
    assert bench.expected(again) == whole
    bench.assert_idle()


def test_guided_and_free_answers_share_steps() -> None:
    bench = DecodeBench(num_blocks=300)
    rules = [talkative, None, runs(3, 3, 3), None, talkative, runs(12, after=4)]
    keys = [
        bench.submit([at, *PROMPT], max_tokens=20 + at, rule=rule, transfer=at % 2 == 0)
        for at, rule in enumerate(rules)
    ]
    for key in keys[::2]:
        bench.transfer(key)
    bench.run()
    for at, key in enumerate(keys):
        bench.assert_complete(key, first_index=int(at % 2 == 0))
    bench.assert_idle()


@pytest.mark.parametrize("num_blocks", [9, 11, 14])
def test_blocks_may_be_taken_in_the_middle_of_runs(num_blocks: int) -> None:
    preempted = 0
    for length in range(1, 14):
        bench = DecodeBench(num_blocks=num_blocks, settings=DecodeSettings(watermark=0.0))
        keys = [
            bench.submit([at], max_tokens=24, rule=rule, transfer=False)
            for at, rule in enumerate([None, runs(length, length), talkative, runs(length, after=2)])
        ]
        bench.run()
        for key in keys:
            bench.assert_complete(key, first_index=0)
            preempted += bench.ledger.finishes[key].preemptions
        bench.assert_idle()
    assert preempted > 5


def test_a_run_that_the_pool_cannot_hold_ends_its_request_alone() -> None:
    bench = DecodeBench(num_blocks=6, settings=DecodeSettings(watermark=0.0))
    key = bench.submit([1], max_tokens=60, rule=runs(30, after=2), transfer=False)
    other = bench.submit([2], max_tokens=10, rule=talkative, transfer=False)
    bench.run()
    assert bench.error_code(key) == "no_kv_blocks"
    bench.assert_tokens(key)
    bench.assert_complete(other, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("way", [come_by_transfer, come_by_local_prefill])
def test_a_seat_may_be_lost_in_the_middle_of_a_run(way: Way, length: int) -> None:
    """Whoever is unseated keeps its blocks, but has none yet for a run that was just told."""
    for wait in range(1, 9):
        bench = DecodeBench(settings=DecodeSettings(max_running=1, step_tokens=4))
        low = bench.submit(PROMPT, max_tokens=40, rule=runs(length, 2, length), priority=1, transfer=False)
        if way is come_by_transfer:
            bench.cancel(low)
            low = bench.submit(PROMPT, max_tokens=40, rule=runs(length, 2, length), priority=1)
            bench.transfer(low)
        for _ in range(wait):
            bench.step()
        high = bench.submit([5, 6, 7], max_tokens=4, rule=runs(1), transfer=False)
        bench.run()
        bench.assert_complete(high, first_index=0)
        bench.assert_complete(low, first_index=int(way is come_by_transfer))
        bench.assert_idle()


@pytest.mark.parametrize("wait", range(1, 8))
def test_a_cancel_while_rows_are_under_way(wait: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=60, rule=runs(2, 3, 2, 4), transfer=False)
    other = bench.submit(PROMPT[2:], max_tokens=20, rule=talkative, transfer=False)
    for _ in range(wait):
        bench.step()
    bench.cancel(key)
    bench.run()
    bench.assert_tokens(key)
    assert bench.ledger.finishes[key].reason is FinishReason.CANCELLED
    bench.assert_complete(other, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_guide_that_allows_nothing_ends_its_request_with_the_guides_error(count: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=20, rule=nothing_after(count), transfer=False)
    bench.guides[key].error = InvalidRequest("the grammar cannot go on", "response_format")
    others = [
        bench.submit([at, *PROMPT], max_tokens=12, rule=rule, transfer=False)
        for at, rule in [(1, None), (2, talkative)]
    ]
    bench.run()
    finish = bench.ledger.finishes[key]
    assert bench.error_code(key) == "invalid_request"
    assert "the grammar cannot go on" in finish.error_message
    assert bench.ledger.tokens.get(key, []) == bench.expected(key)
    assert finish.num_tokens == count
    for other in others:
        bench.assert_complete(other, first_index=0)
    assert totals(bench, "row_faults") == 0, "the model's numbers were sound"
    bench.assert_idle()


@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("wait", range(6))
def test_a_failed_step_ends_guided_answers_and_the_engine_goes_on(where: str, wait: int) -> None:
    bench = DecodeBench()
    keys = [bench.submit([at, *PROMPT], max_tokens=30, rule=runs(2, 3, 4), transfer=False) for at in range(2)]
    for _ in range(wait):
        bench.step()
    bench.runner.fault = where  # type: ignore[assignment]
    bench.run()
    for key in keys:
        bench.assert_tokens(key)
        assert bench.error_code(key) == "engine_fault"
    after = bench.submit(PROMPT, max_tokens=20, rule=talkative, transfer=False)
    bench.run()
    bench.assert_complete(after, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("wait", range(1, 6))
def test_a_row_that_is_not_finite_ends_its_request_alone_in_a_run_or_before_it(wait: int) -> None:
    bench = DecodeBench()
    keys = [bench.submit([at, *PROMPT], max_tokens=30, rule=runs(2, 3, 4), transfer=False) for at in range(2)]
    for _ in range(wait):
        bench.step()
    slot = bench.worker._sequences[keys[0]].slot
    bench.runner.poison = lambda row: row.slot == slot
    bench.step()
    bench.runner.poison = None
    bench.run()
    bench.assert_tokens(keys[0])
    assert bench.error_code(keys[0]) == "engine_fault"
    bench.assert_complete(keys[1], first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guide_is_told_each_token_that_was_sampled_and_no_other(temperature: float) -> None:
    bench = DecodeBench()
    sampling = SamplingParams(max_tokens=1, temperature=temperature, seed=4)
    key = bench.submit(PROMPT, max_tokens=25, rule=talkative, transfer=False, sampling=sampling)
    bench.run()
    bench.assert_complete(key, first_index=0)
    assert bench.guides[key].known[:25] == bench.expected(key)


class _Linear:
    """A step takes 5 ms and 50 us a token of a prompt."""

    def seconds(self, *, decode_rows: int, prompt_tokens: int, kv_tokens: int, prompt_kv: int) -> float:
        return 5e-3 + 50e-6 * prompt_tokens + 10e-6 * decode_rows


def _budgeted(cost: StepCost | None) -> DecodeBench:
    return DecodeBench(num_blocks=800, max_context_tokens=1000, cost=cost)


@pytest.mark.parametrize("most", [0, 1])
def test_what_a_step_does_not_take_as_a_run_is_computed_token_by_token(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card's steps with many rows: the same answers, and no step waits for a run."""
    monkeypatch.setattr(EchoRunner, "max_runs", lambda self, rows: most)
    bench = DecodeBench(num_blocks=200)
    keys = [bench.submit([at, *PROMPT], max_tokens=60, transfer=False, rule=runs(12, 3, 5, after=2)) for at in range(4)]
    steps = bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=0)
    assert all(sum(len(row[2] or (0,)) > 1 and row[1] >= 24 for row in plan) <= most for plan in bench.trace)
    if not most:
        assert steps >= 60, "each token of each answer has a step"
    bench.assert_idle()


def test_runs_go_before_prompts_that_came_earlier_and_all_end_under_a_budget() -> None:
    bench = _budgeted(_Linear())
    reader = bench.submit(PROMPT, max_tokens=90, transfer=False)
    bench.step()
    prompts = [bench.submit([at] * 900, max_tokens=3, transfer=False) for at in (7, 8, 9)]
    guided = bench.submit([1, *PROMPT], max_tokens=120, rule=runs(40, 3, 5, after=2))
    bench.transfer(guided)
    seen = 0
    while len(bench.ledger.tokens.get(guided, [])) < 45:
        sequence = bench.worker._sequences[guided]
        if sequence.state is State.RUNNING and sequence.missing > 1:
            assert guided not in bench.worker._scheduler.all.prompts, "it waits behind a prompt"
            seen += 1
        computed = sequence.launched
        bench.step()
        assert sequence.launched > computed or not sequence.missing
    assert seen
    assert not any(bench.ledger.tokens.get(key) for key in prompts[1:]), "there were prompts to wait behind"
    bench.run()
    bench.assert_complete(guided, first_index=1)
    for key in (reader, *prompts):
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("length", [2, 30])
def test_whoever_has_a_run_is_no_prompt_that_has_waited_long(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else any guided answer that has been going for a second lets prompts take the readers' time."""
    waits: list[float] = []
    real = DecodeScheduler._demand

    def demand(self: DecodeScheduler, *args: object) -> object:
        found = real(self, *args)  # type: ignore[arg-type]
        waits.append(found.oldest_wait_s)
        return found

    monkeypatch.setattr(DecodeScheduler, "_demand", demand)
    bench = _budgeted(_Linear())
    bench.submit(PROMPT, max_tokens=40, transfer=False)
    guided = bench.submit([1, *PROMPT], max_tokens=80, rule=runs(*[length] * 8), transfer=False)
    bench.step()
    bench.step()
    bench.clock.advance(50.0)
    bench.submit([5] * 300, max_tokens=2, transfer=False)
    waits.clear()
    bench.run()
    bench.assert_complete(guided, first_index=0)
    assert waits
    assert max(waits) < 50.0


def test_a_run_longer_than_a_step_keeps_its_place_before_prompts() -> None:
    bench = DecodeBench(num_blocks=200, settings=DecodeSettings(step_tokens=8))
    prompts = [bench.submit([at] * 60, max_tokens=2, transfer=False) for at in (7, 8)]
    bench.step()
    guided = bench.submit(PROMPT[:3], max_tokens=60, rule=runs(30, after=2))
    bench.transfer(guided)
    while len(bench.ledger.tokens.get(guided, [])) < 31:
        bench.step()
    steps = 0
    while bench.worker._sequences[guided].missing > 1:
        bench.step()
        steps += 1
    assert steps <= 5
    assert not any(key in bench.ledger.tokens for key in prompts)
    bench.run()
    bench.assert_complete(guided, first_index=1)
    for key in prompts:
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_blocks_of_a_slot_that_has_sampled_stay_when_a_run_is_computed_elsewhere_first(prefix_cache: bool) -> None:
    """Two equal answers, one a few steps ahead: what it has computed of a run is not put under the other's slot."""
    for lag in range(1, 9):
        bench = DecodeBench(prefix_cache=prefix_cache, settings=DecodeSettings(step_tokens=5))
        ahead = bench.submit(PROMPT, max_tokens=40, rule=runs(9, 9, 9), transfer=False)
        for _ in range(lag):
            bench.step()
        behind = bench.submit(PROMPT, max_tokens=40, rule=runs(9, 9, 9), transfer=False)
        bench.step()
        tables: dict[int, tuple[int, ...]] = {}
        while bench.step():
            sequence = bench.worker._sequences.get(behind)
            if sequence is None or sequence.state is not State.RUNNING or not sequence.num_new:
                continue
            slot, blocks = sequence.slot, tuple(sequence.blocks)
            assert slot is not None
            before = tables.get(slot, ())
            assert blocks[: len(before)] == before, "a block changed under a slot that has sampled"
            tables = {slot: blocks}
        for key in (ahead, behind):
            bench.assert_complete(key, first_index=0)
        bench.assert_idle()


def test_the_fake_guide_asserts_what_a_guide_may_expect() -> None:
    """Otherwise these tests would say little."""
    guide = FakeGuide(3, runs(2), resume=(4,))
    assert guide.known == [4, 9001, 9002]
    assert guide.accept(4, 9001) == ()
    with pytest.raises(AssertionError, match="is 9002"):
        guide.accept(5, 1)
    with pytest.raises(AssertionError, match="token 4 after 3"):
        guide.accept(7, 1)
    with pytest.raises(AssertionError, match="not allowed"):
        guide.accept(6, 60)
