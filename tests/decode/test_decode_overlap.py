"""A step is launched before the last one's tokens are read: what is known of it then, and what comes between."""

from __future__ import annotations

import pytest

from diptych.decode import scheduler
from diptych.decode.sequence import State
from diptych.decode.testing import PEER, DecodeBench
from diptych.decode.worker import DecodeWorker
from diptych.kvtransfer.pool import BlockPool
from diptych.prefill.worker import PrefillWorker
from diptych.protos.pipeline import StepPipeline
from diptych.protos.settings import DecodeSettings, PrefillSettings
from diptych.protos.step import SlotPool
from diptych.protos.testing import EchoRunner, FakeClock, FakeReceiver, FakeSender, Ledger, echo_reference
from diptych.protos.types import (
    DecodeOrder,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    SamplingParams,
    TransferKey,
)

PROMPT = list(range(100, 123))  # 23 tokens: 5 full blocks of 4 and a rest


@pytest.fixture(autouse=True)
def depth(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of all benches; the other depth has nothing to say here."""
    monkeypatch.setattr(DecodeBench, "depth", 2)
    return 2


def test_a_step_is_launched_before_the_tokens_it_goes_on_from_are_read() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, transfer=False, max_tokens=3)
    bench.step()
    assert (bench.pipeline.num_outstanding, bench.ledger.tokens) == (1, {})
    bench.step()
    ((_, start, tokens, _, sample, *_),) = bench.trace[-1]
    assert (start, tokens) == (23, None), "the id is on the device"
    assert getattr(sample, "position", None) == 24
    assert len(bench.ledger.tokens[key]) == bench.pipeline.num_outstanding == 1
    bench.run()
    bench.assert_complete(key, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize(("max_tokens", "context"), [(5, 200), (50, len(PROMPT) + 5)])
def test_an_end_by_length_is_known_before_its_token_is_read(max_tokens: int, context: int) -> None:
    bench = DecodeBench(max_context_tokens=context)
    key = bench.submit(PROMPT, transfer=False, max_tokens=max_tokens)
    assert bench.run() == 5
    assert max(row[1] for plan in bench.trace for row in plan) == len(PROMPT) + 3  # type: ignore[type-var]
    assert bench.ledger.tokens[key] == echo_reference(PROMPT, 5)
    assert bench.ledger.finishes[key].reason is FinishReason.LENGTH
    bench.assert_idle()


def test_a_stop_token_costs_one_row_more_whose_token_nobody_sees_and_whose_kv_has_no_name() -> None:
    bench = DecodeBench()
    answer = echo_reference(PROMPT, 5)
    key = bench.submit(PROMPT, transfer=False, max_tokens=50, stop=[answer[-1]])
    assert bench.run() == 5 + 1
    bench.assert_complete(key, first_index=0)
    assert bench.ledger.finishes[key].num_tokens == 5
    assert bench.worker.counters()["decode_generated_tokens_total"] == 5
    # The row too many has filled the seventh block of 4 tokens.
    again = bench.submit([*PROMPT, *answer, 9], transfer=False, max_tokens=1)
    bench.run()
    assert bench.ledger.finishes[again].cached_tokens == 24
    bench.assert_complete(again, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_whoever_ends_while_its_row_is_under_way_keeps_its_blocks_and_slot_until_it_is_back(how: str) -> None:
    bench = DecodeBench(num_blocks=7, slots=1)
    key = bench.submit(PROMPT, transfer=False, deadline=bench.clock() + 5)
    bench.step()
    bench.step()
    told = list(bench.ledger.tokens[key])
    if how == "cancel":
        bench.cancel(key)
    else:
        bench.clock.advance(5)
        bench.step()
    assert key in bench.ledger.finishes, "it is told at once"
    if how == "cancel":
        assert (bench.pool.counts().used, bench.slots.num_free) == (6, 0)
        assert bench.worker.load().running == 0
    other = bench.submit([1] * 20, transfer=False, max_tokens=2)
    bench.run()
    assert bench.ledger.tokens[key] == told
    bench.assert_complete(other, first_index=0)
    bench.assert_idle()


def test_a_late_event_of_its_transfer_frees_nothing_that_a_row_under_way_uses() -> None:
    bench = DecodeBench()
    answer = echo_reference(PROMPT, 3)
    key = bench.submit(PROMPT, max_tokens=50, stop=[answer[-1]])
    bench.want(key)
    bench.step()
    event = bench.receiver.commit(key, PROMPT, answer[0])
    bench.deliver(event)
    while key not in bench.ledger.finishes:
        bench.step()
    assert bench.worker._sequences[key].state is State.DRAINING
    bench.deliver(event)
    assert bench.pool.counts().used
    bench.run()
    bench.assert_complete(key, first_index=1)
    bench.assert_idle()


def test_a_faulty_row_is_found_a_step_late_and_counts_once() -> None:
    bench = DecodeBench()
    bad, good = bench.submit(PROMPT, transfer=False), bench.submit(PROMPT[::-1], transfer=False)
    bench.step()
    slot = bench.worker._sequences[bad].slot
    bench.runner.poison = lambda row: row.slot == slot
    bench.step()
    bench.runner.poison = None
    assert bad not in bench.ledger.finishes
    bench.step()
    assert bench.error_code(bad) == "engine_fault"
    assert bench.pool.counts().used == 7 + 7, "the row that went on from the faulty one is under way"
    bench.run()
    assert bench.worker.counters()["decode_row_faults_total"] == 1
    bench.assert_tokens(bad)
    bench.assert_complete(good, first_index=0)
    bench.assert_idle()


def test_a_step_that_raises_ends_its_rows_and_spares_who_came_with_the_next_one() -> None:
    bench = DecodeBench()
    first = bench.submit(PROMPT, transfer=False)
    bench.step()
    bench.runner.fault = "collect"
    bench.step()
    second = bench.submit(PROMPT[::-1], transfer=False)
    bench.step()
    assert bench.error_code(first) == "engine_fault"
    assert second not in bench.ledger.finishes
    bench.run()
    bench.assert_tokens(first)
    bench.assert_complete(second, first_index=0)
    bench.assert_idle()


def test_nothing_goes_on_from_a_step_that_could_not_be_launched() -> None:
    """The slots' last tokens are those of the step before, and histories lack one."""
    bench = DecodeBench()
    sampling = SamplingParams(max_tokens=1, presence_penalty=0.5)
    key = bench.submit(PROMPT, transfer=False, sampling=sampling)
    for _ in range(3):
        bench.step()
    bench.runner.fault = "launch"
    bench.step()
    assert bench.error_code(key) == "engine_fault"
    assert len(bench.ledger.tokens[key]) == 3, "the step before was sound"
    bench.assert_tokens(key)
    bench.assert_idle()


def test_who_loses_its_blocks_has_all_its_tokens_by_then() -> None:
    bench = DecodeBench(num_blocks=9)
    old = bench.submit(PROMPT[:12], transfer=False, max_tokens=20)
    young = bench.submit(PROMPT[8:20], transfer=False, max_tokens=20)
    while not bench.worker.counters()["decode_preemptions_total"]:
        assert bench.step()
    tokens = bench.worker.counters()["decode_tokens_total"]
    had = len(bench.ledger.tokens[young])
    assert tokens == 2 * 12 + (had - 1) * 2 + 1, "every row came back, and the older one goes on"
    sequence = bench.worker._sequences[young]
    assert (sequence.state, sequence.in_flight, sequence.pending, sequence.launched) == (State.WAITING, 0, 0, 0)
    bench.run()
    for key in (old, young):
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


def test_nobody_loses_its_seat_where_what_comes_back_makes_room() -> None:
    """The only seat is taken by a lower class whose end is under way."""
    bench = DecodeBench(settings=DecodeSettings(max_running=1))
    low = bench.submit(PROMPT, transfer=False, max_tokens=2, priority=1)
    bench.step()
    bench.step()
    high = bench.submit(PROMPT[::-1], transfer=False, max_tokens=2)
    bench.step()
    bench.assert_complete(low, first_index=0)
    assert [row[1] for row in bench.trace[-1]] == [0], "the seat is used in the same step"
    bench.run()
    bench.assert_complete(high, first_index=0)
    bench.assert_idle()


def test_the_worker_has_something_to_do_while_a_step_is_under_way_and_only_then() -> None:
    bench = DecodeBench()
    bench.submit(PROMPT, transfer=False, max_tokens=4, stop=echo_reference(PROMPT, 3)[2:])
    while bench.step():
        pass
    assert bench.pipeline.num_outstanding == 0
    assert bench.pool.counts().used == 0


def test_prompt_logprobs_are_asked_for_once_though_chunks_overlap() -> None:
    bench = DecodeBench(settings=DecodeSettings(step_tokens=4))
    key = bench.submit(PROMPT, transfer=False, sampling=SamplingParams(max_tokens=1, prompt_logprobs=1))
    bench.run()
    asked = [row for plan in bench.trace for row in plan if row[5] is not None]
    assert [row[1] for row in asked] == [0, 4, 8, 12, 16, 20]
    bench.assert_complete(key, first_index=0)
    assert len(bench.ledger.prompt_logprobs[key]) == 22
    bench.assert_idle()


def test_a_step_tells_few_positions_of_prompts_and_others_are_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a row of logits, for which the memory of a card is planned."""
    monkeypatch.setattr(scheduler, "MOST_TOLD", 6)
    bench = DecodeBench(settings=DecodeSettings(step_tokens=40))
    asking = SamplingParams(max_tokens=1, prompt_logprobs=1)
    keys = [bench.submit(PROMPT[at:], transfer=False, sampling=asking) for at in range(3)]
    other = bench.submit(PROMPT[::-1], transfer=False, max_tokens=2)
    bench.run()
    told = [sum(len(row[2]) for row in plan if row[5] is not None) for plan in bench.trace]
    assert max(told) == 6
    first = next(at for at, plan in enumerate(bench.trace) if any(row[5] is None for row in plan))
    assert first == 0, "who asks for none is computed at once"
    for at, key in enumerate(keys):
        assert len(bench.ledger.prompt_logprobs[key]) == 22 - at
        bench.assert_complete(key, first_index=0)
    bench.assert_complete(other, first_index=0)
    bench.assert_idle()


def test_two_workers_of_one_runner_get_their_own_results() -> None:
    runner, clock = EchoRunner(num_blocks=64, block_tokens=4, depth=2), FakeClock()
    pool, slots = BlockPool(num_blocks=64, block_tokens=4), SlotPool(16)
    pipeline = StepPipeline(runner, clock)
    ledgers = Ledger(), Ledger()
    sender, receiver = FakeSender(runner), FakeReceiver(runner)
    prefill = PrefillWorker(
        settings=PrefillSettings(step_tokens=5),
        pipeline=pipeline,
        pool=pool,
        slots=slots,
        sender=sender,
        emit=ledgers[0],
        clock=clock,
        max_context_tokens=200,
    )
    decode = DecodeWorker(
        settings=DecodeSettings(),
        pipeline=pipeline,
        pool=pool,
        slots=slots,
        receiver=receiver,
        emit=ledgers[1],
        clock=clock,
        max_context_tokens=200,
    )
    keys = [TransferKey(bytes([at]) * 16) for at in range(6)]
    prompts = [[at, *PROMPT] for at in range(6)]
    for at, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        request = GenerateRequest(key=key, prompt=tuple(prompt), sampling=SamplingParams(max_tokens=7))
        if at % 2:
            decode.submit(DecodeOrder(request=request, prefill=None))
        else:
            prefill.submit(PrefillOrder(request=request, decode=PEER))
    most = 0
    while any([prefill.step(), decode.step()]):
        most = max(most, pipeline.num_outstanding)
        pool.check_integrity()
    assert most == 1, "between two turns"
    for at, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        assert ledgers[at % 2].tokens[key] == echo_reference(prompt, 7 if at % 2 else 1)
    for key in keys[::2]:
        prefill.on_transfer(sender.release(key))
    assert (pipeline.num_outstanding, pool.counts().used, slots.num_free) == (0, 0, 16)
