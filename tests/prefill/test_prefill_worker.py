"""What a prefill worker promises: the right token 0, KV that stays until released, one Finish, nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest

from diptych.kvtransfer.pool import BlockTable
from diptych.prefill.testing import PrefillBench
from diptych.protos.errors import Cancelled, PeerLost
from diptych.protos.settings import PrefillSettings
from diptych.protos.testing import echo_reference
from diptych.protos.types import FinishReason, TransferKey

PROMPT = list(range(100, 123))  # 23 tokens: 5 full blocks of 4 and a rest


def settings(step_tokens: int = 512, max_running: int = 16, max_waiting: int = 256) -> PrefillSettings:
    return PrefillSettings(step_tokens=step_tokens, max_running=max_running, max_waiting=max_waiting)


def code(bench: PrefillBench, key: TransferKey) -> str:
    finish = bench.ledger.finishes[key]
    assert finish.reason is FinishReason.ERROR
    return finish.error_code


@pytest.mark.parametrize("step_tokens", [1, 2, 3, 4, 5, 7, 16, 22, 23, 24, 512])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 23])
def test_any_chunk_size_gives_the_reference_token(step_tokens: int, num_prompt: int) -> None:
    bench = PrefillBench(settings=settings(step_tokens))
    key = bench.submit(PROMPT[:num_prompt])
    assert bench.run() == -(-num_prompt // step_tokens)
    assert bench.ledger.tokens[key] == echo_reference(PROMPT[:num_prompt], 1)
    assert bench.ledger.first_index[key] == 0
    assert key not in bench.ledger.finishes, "the KV is still on its way"
    bench.release(key)
    assert bench.ledger.finishes[key].reason is FinishReason.HANDOFF
    bench.assert_idle()


def test_each_chunk_is_announced_when_it_is_computed(depth: int) -> None:
    bench = PrefillBench(settings=settings(8))
    key = bench.submit(PROMPT)
    upto = []
    while bench.step():
        upto.append(bench.sender.transfers[key].upto)
    assert upto == [*[0] * (depth - 1), 8, 16, 23]
    sending = bench.sender.transfers[key]
    assert sending.num_tokens == 23
    assert len(sending.blocks) == 6
    assert (sending.first_token, sending.final) == (echo_reference(PROMPT, 1)[0], False)


def test_a_step_is_shared_by_several_prompts_in_order_of_arrival() -> None:
    bench = PrefillBench(settings=settings(10))
    prompts = [PROMPT[:7], PROMPT[5:11], [7], PROMPT[3:20]]
    keys = [bench.submit(prompt) for prompt in prompts]
    bench.run()
    assert [[row[1:3] for row in plan] for plan in bench.trace] == [
        [(0, tuple(prompts[0])), (0, tuple(prompts[1][:3]))],
        [(3, tuple(prompts[1][3:])), (0, (7,)), (0, tuple(prompts[3][:6]))],
        [(6, tuple(prompts[3][6:16]))],
        [(16, tuple(prompts[3][16:]))],
    ]
    assert [bench.ledger.tokens[key] for key in keys] == [echo_reference(prompt, 1) for prompt in prompts]
    bench.release_sent()
    bench.assert_idle()


def test_the_sampling_position_is_the_length_of_the_prompt() -> None:
    """The echo runner asserts position = start + num_tokens; here: with a prefix hit and chunks, too."""
    bench = PrefillBench(settings=settings(5))
    for _ in range(2):
        bench.submit(PROMPT)
        bench.run()
        bench.release_sent()
        sample = bench.trace[-1][0][4]
        assert getattr(sample, "position", None) == len(PROMPT)


def test_an_equal_prefix_is_not_computed_again() -> None:
    bench = PrefillBench()
    first = bench.submit(PROMPT)
    bench.run()
    bench.release(first)
    second = bench.submit([*PROMPT[:17], 9, 9])
    bench.step()
    bench.collect()
    assert bench.trace[-1][0][1] == 16, "four blocks were found"
    assert bench.sender.transfers[second].upto == 19
    assert bench.ledger.tokens[second] == echo_reference([*PROMPT[:17], 9, 9], 1)
    bench.release(second)
    assert bench.ledger.finishes[second].cached_tokens == 16
    assert bench.ledger.finishes[first].cached_tokens == 0
    bench.assert_idle()


def test_cached_tokens_are_announced_before_anything_is_computed() -> None:
    bench = PrefillBench(settings=settings(2))
    bench.submit(PROMPT)
    bench.run()
    key = bench.submit(PROMPT)
    bench.step()
    bench.collect()
    assert bench.sender.transfers[key].upto == 22, "20 cached tokens at once and two computed"


def test_a_prompt_that_is_cached_entirely_computes_its_last_block() -> None:
    bench = PrefillBench()
    prompt = PROMPT[:8]
    bench.submit(prompt)
    bench.run()
    key = bench.submit(prompt)
    bench.run()
    assert bench.trace[-1][0][1] == 4
    bench.release_sent()
    assert bench.ledger.finishes[key].cached_tokens == 4


def test_a_prefix_is_found_while_its_first_prompt_still_runs() -> None:
    bench = PrefillBench(settings=settings(12))
    bench.submit([*PROMPT, *PROMPT])
    bench.step()
    bench.step()  # 24 tokens computed, 22 to go
    second = bench.submit([*PROMPT, 5, 5])
    bench.run()
    bench.release_sent()
    assert bench.ledger.finishes[second].cached_tokens == 20
    assert bench.ledger.tokens[second] == echo_reference([*PROMPT, 5, 5], 1)
    bench.assert_idle()


def test_twins_admitted_at_once_compute_what_they_share_once_but_for_what_is_under_way(depth: int) -> None:
    bench = PrefillBench(settings=settings(23))
    keys = [bench.submit(PROMPT) for _ in range(3)]
    other = bench.submit(PROMPT, salt=b"x")
    bench.run()
    assert [bench.sender.transfers[key].upto for key in keys] == [23, 23, 23]
    shared = [list(bench.sender.transfers[key].blocks[:5]) for key in keys]
    second = {1: 3, 2: 23}[depth]  # planned before the first one's KV was known to be there
    assert shared[0] == shared[2], "those sent are those computed"
    assert (shared[0] == shared[1]) == (second == 3)
    assert bench.worker.counters()["prefill_tokens_total"] == 23 + second + 3 + 23
    bench.release_sent()
    assert [bench.ledger.finishes[key].cached_tokens for key in (*keys, other)] == [0, 23 - second, 20, 0]
    assert all(bench.ledger.tokens[key] == echo_reference(PROMPT, 1) for key in (*keys, other))
    bench.assert_idle()


def test_tenants_with_other_salts_share_nothing() -> None:
    bench = PrefillBench()
    bench.submit(PROMPT, salt=b"a")
    bench.run()
    other = bench.submit(PROMPT, salt=b"b")
    bench.run()
    bench.release_sent()
    assert bench.ledger.finishes[other].cached_tokens == 0


@pytest.mark.parametrize(
    ("max_tokens", "stop", "context", "reason"),
    [
        (1, False, 200, FinishReason.LENGTH),
        (8, True, 200, FinishReason.STOP),
        (1, True, 200, FinishReason.STOP),
        (8, False, len(PROMPT) + 1, FinishReason.LENGTH),
    ],
)
def test_a_final_token_0_ends_at_once_and_sends_nothing_more(
    max_tokens: int, stop: bool, context: int, reason: FinishReason
) -> None:
    token = echo_reference(PROMPT, 1)[0]
    bench = PrefillBench(settings=settings(10), max_context_tokens=context)
    key = bench.submit(PROMPT, max_tokens=max_tokens, stop=[token] if stop else [])
    bench.run()
    assert bench.ledger.tokens[key] == [token]
    finish = bench.ledger.finishes[key]
    assert (finish.reason, finish.num_tokens) == (reason, 1)
    sending = bench.sender.transfers[key]
    assert sending.final
    assert sending.upto == 20, "the last chunk is not staged"
    assert bench.pool.counts().used > 0, "the sender still reads"
    bench.cancel(key)
    assert sending.aborted is None, "what has ended is not aborted"
    bench.release(key)
    assert bench.ledger.finishes[key] == finish
    bench.assert_idle()


def test_a_lost_peer_ends_a_request_that_sends() -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT)
    bench.run()
    bench.release(key, PeerLost("the decode engine is gone"))
    assert code(bench, key) == "peer_lost"
    assert bench.ledger.finishes[key].error_message == "the decode engine is gone"
    bench.assert_idle()


def test_a_lost_peer_ends_a_request_that_computes() -> None:
    bench = PrefillBench(settings=settings(4))
    key = bench.submit(PROMPT)
    other = bench.submit(PROMPT[1:])
    bench.step()
    bench.release(key, PeerLost("gone"))
    assert code(bench, key) == "peer_lost"
    bench.collect()
    assert bench.slots.num_free == bench.slots.max_slots - 1
    bench.run()
    assert bench.ledger.tokens[other] == echo_reference(PROMPT[1:], 1)
    bench.release_sent()
    bench.assert_idle()


def test_a_peer_that_was_told_to_cancel_first_counts_as_cancelled() -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT)
    bench.run()
    bench.release(key, Cancelled("by the decode engine"))
    assert bench.ledger.finishes[key].reason is FinishReason.CANCELLED


@pytest.mark.parametrize("when", ["waiting", "running", "sending"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_an_early_end_in_any_state_leaves_nothing(when: str, how: str) -> None:
    bench = PrefillBench(settings=settings(10, max_running=1))
    deadline = bench.clock() + 5
    head = bench.submit(PROMPT) if when == "waiting" else None
    if head is not None:
        bench.step()  # otherwise the deadline would let the second overtake it
    key = bench.submit(PROMPT, deadline=deadline)
    if when == "running":
        bench.step()
    if when == "sending":
        bench.run()
    if when == "waiting":
        bench.step()
    assert bench.worker.next_wake() == deadline
    if how == "cancel":
        bench.cancel(key)
        assert bench.ledger.finishes[key].reason is FinishReason.CANCELLED
    else:
        bench.clock.advance(5)
        bench.step()
        assert code(bench, key) == "deadline_exceeded"
    assert bench.worker.next_wake() is None
    if when != "waiting":
        assert bench.sender.transfers[key].aborted is not None
        assert bench.pool.counts().used == 6, "the sender still reads the blocks"
    bench.cancel(key)
    bench.run()
    bench.release_sent()
    bench.run()
    assert (head is None) or head in bench.ledger.finishes
    bench.assert_idle()


def test_a_deadline_in_the_past_never_starts() -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT, deadline=bench.clock() - 1)
    assert bench.worker.next_wake() == bench.clock() - 1
    bench.run()
    assert code(bench, key) == "deadline_exceeded"
    assert bench.trace == []
    bench.release_sent()
    bench.assert_idle()


def test_a_transfer_is_open_while_its_prompt_still_waits() -> None:
    """The decode engine asks at once; a transfer unknown for as long as a queue lasts would be given up."""
    bench = PrefillBench(settings=settings(max_running=1))
    first, second = bench.submit(PROMPT), bench.submit(PROMPT)
    assert set(bench.sender.transfers) == {first, second}
    bench.release(second, PeerLost("the decode engine is gone"))
    assert code(bench, second) == "peer_lost"
    bench.run()
    assert second not in bench.ledger.tokens
    bench.release_sent()
    bench.assert_idle()


def test_a_cancelled_request_keeps_its_blocks_until_released_though_others_need_them() -> None:
    """The sender fake compares the KV at release: a block given away early would have changed."""
    bench = PrefillBench(num_blocks=6)
    first = bench.submit(PROMPT)
    bench.step()
    bench.cancel(first)
    second = bench.submit([*PROMPT[1:], 3])
    bench.run()
    assert second not in bench.ledger.tokens
    bench.release(first)
    bench.run()
    assert bench.ledger.tokens[second] == echo_reference([*PROMPT[1:], 3], 1)
    bench.release(second)
    bench.assert_idle()


def test_nobody_overtakes_a_head_that_does_not_fit() -> None:
    bench = PrefillBench(num_blocks=8)
    first = bench.submit(PROMPT[:20])
    large = bench.submit(list(range(30)))
    small = bench.submit([1, 2])
    bench.run()
    assert set(bench.ledger.tokens) == {first}
    assert (bench.worker.load().running, bench.worker.load().waiting) == (1, 2)
    bench.release(first)
    bench.run()
    assert set(bench.ledger.tokens) == {first, large}
    bench.release(large)
    bench.run()
    bench.release(small)
    bench.assert_idle()


def test_a_blocked_head_is_not_named_again_until_the_pool_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = PrefillBench(num_blocks=8)
    first = bench.submit(PROMPT[:20])
    bench.submit(list(range(30)))
    bench.step()
    opened: list[Sequence[int]] = []
    real = bench.pool.open

    def spy(prompt: Sequence[int], salt: bytes, *, max_cached_tokens: int) -> BlockTable:
        opened.append(prompt)
        return real(prompt, salt, max_cached_tokens=max_cached_tokens)

    monkeypatch.setattr(bench.pool, "open", spy)
    for _ in range(5):
        bench.step()
    assert not opened
    bench.release(first)
    bench.step()
    assert opened


def test_at_most_max_running_requests_hold_blocks() -> None:
    bench = PrefillBench(settings=settings(max_running=2))
    keys = [bench.submit(PROMPT[at:]) for at in range(4)]
    bench.run()
    assert bench.announced() == keys[:2]
    bench.release(keys[0])
    bench.run()
    assert bench.announced() == keys[1:3]
    bench.release_sent()
    bench.run()
    bench.release_sent()
    bench.assert_idle()


def test_without_a_free_slot_a_prompt_waits() -> None:
    bench = PrefillBench(slots=1, settings=settings(4))
    first, second = bench.submit(PROMPT), bench.submit(PROMPT[2:])
    bench.step()
    bench.collect()
    assert bench.announced() == [first]
    bench.run()
    assert bench.announced() == [first, second], "a slot is free as soon as token 0 is sampled"


def test_an_id_outside_of_the_vocabulary_is_refused_before_it_can_fail_a_step_of_others() -> None:
    bench = PrefillBench()
    stranger = bench.submit([5, bench.runner.vocab_size])
    assert code(bench, stranger) == "invalid_request"
    assert bench.submit([5, bench.runner.vocab_size - 1]) not in bench.ledger.finishes


def test_a_full_queue_refuses() -> None:
    bench = PrefillBench(settings=settings(max_running=1, max_waiting=2))
    keys = [bench.submit(PROMPT) for _ in range(4)]
    assert set(bench.ledger.finishes) == {keys[3]}
    assert code(bench, keys[3]) == "overloaded"
    bench.cancel(keys[1])
    assert bench.submit(PROMPT) not in bench.ledger.finishes, "there is room again, before its peer says a word"


def test_ended_requests_whose_peer_is_silent_take_no_place_in_the_queue_until_they_are_very_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diptych.prefill.worker.MAX_DRAINING", 5)
    bench = PrefillBench(settings=settings(max_running=1, max_waiting=1))
    for _ in range(5):
        bench.cancel(bench.submit(PROMPT))
    last = bench.submit(PROMPT)
    assert last not in bench.ledger.finishes
    bench.cancel(last)
    assert code(bench, bench.submit(PROMPT)) == "overloaded"
    bench.release_sent()
    assert bench.submit(PROMPT) not in bench.ledger.finishes


@pytest.mark.parametrize(
    ("num_prompt", "expected"), [(0, "invalid_request"), (200, "context_length_exceeded"), (37, "no_kv_blocks")]
)
def test_an_impossible_request_ends_at_once(num_prompt: int, expected: str) -> None:
    bench = PrefillBench(num_blocks=9)
    key = bench.submit([1] * num_prompt)
    assert code(bench, key) == expected
    bench.assert_idle()


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_step_that_raises_ends_its_rows_and_nobody_else(where: Literal["launch", "collect"]) -> None:
    bench = PrefillBench(settings=settings(10))
    sent = bench.submit([1, 2, 3])
    bench.step()
    rows = [bench.submit(PROMPT[:4]), bench.submit(PROMPT)]
    waiting = bench.submit(PROMPT[4:])
    bench.runner.fault = where
    assert bench.step()
    bench.collect()
    assert [code(bench, key) for key in rows] == ["engine_fault"] * 2
    assert bench.pool.counts().cached == 0, "nothing of the failed step can be found"
    bench.release_sent()
    bench.run()
    assert bench.ledger.tokens[waiting] == echo_reference(PROMPT[4:], 1)
    assert bench.ledger.finishes[sent].reason is FinishReason.HANDOFF
    again = bench.submit(PROMPT)
    bench.run()
    assert bench.ledger.tokens[again] == echo_reference(PROMPT, 1)
    bench.release_sent()
    bench.assert_idle()
    assert bench.worker.counters()["prefill_step_faults_total"] == 1


def test_late_and_unknown_events_change_nothing() -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT)
    bench.run()
    event = bench.sender.release(key)
    bench.worker.on_transfer(event)
    finish = bench.ledger.finishes[key]
    bench.worker.on_transfer(event)
    bench.cancel(key)
    bench.cancel(TransferKey(b"?" * 16))
    assert bench.ledger.finishes == {key: finish}
    bench.assert_idle()


def test_a_second_order_with_a_living_key_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT)
    bench.requests.clear()
    assert bench.submit(PROMPT) == key
    bench.run()
    bench.release(key)
    assert "second prefill order" in caplog.text
    bench.assert_idle()


def test_times_and_bytes_are_reported() -> None:
    bench = PrefillBench(settings=settings(12))
    key = bench.submit(PROMPT)
    bench.clock.advance(1)
    bench.step()
    bench.clock.advance(2)
    bench.step()
    bench.collect()
    bench.clock.advance(4)
    bench.release(key)
    finish = bench.ledger.finishes[key]
    times = finish.times
    assert (times.queue, times.prefill, times.transfer, times.decode) == (1, 2, 4, 0)
    assert (finish.transfer_bytes, finish.transport) == (2300, "fake")


def test_the_same_trace_gives_the_same_schedule() -> None:
    def play() -> list[tuple[tuple[object, ...], ...]]:
        bench = PrefillBench(num_blocks=20, settings=settings(9, max_running=4))
        for at in range(12):
            key = bench.submit([at % 3] * (1 + 5 * at % 31))
            bench.step()
            if at % 4 == 3:
                bench.cancel(key)
            if at % 3 == 2:
                bench.release_sent()
        bench.run()
        return bench.trace

    assert play() == play()
