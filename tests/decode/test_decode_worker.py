"""What a decode worker promises: the tokens of one undisturbed engine, one Finish, nothing left behind."""

from __future__ import annotations

from typing import Literal

import pytest

from diptych.decode.testing import DecodeBench
from diptych.protos.errors import PeerLost
from diptych.protos.ports import WantBlocks
from diptych.protos.settings import DecodeSettings
from diptych.protos.testing import echo_reference
from diptych.protos.types import FinishReason, TransferKey

PROMPT = list(range(100, 123))  # 23 tokens: 5 full blocks of 4 and a rest


def settings(step_tokens: int = 512, max_running: int = 16, max_waiting: int = 256) -> DecodeSettings:
    return DecodeSettings(step_tokens=step_tokens, max_running=max_running, max_waiting=max_waiting)


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 23])
def test_generation_goes_on_after_a_transfer_with_token_1(num_prompt: int) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT[:num_prompt], max_tokens=20)
    assert not bench.step()
    bench.transfer(key)
    assert bench.run() == 19
    bench.assert_complete(key, first_index=1)
    bench.assert_idle()


@pytest.mark.parametrize("step_tokens", [1, 2, 3, 5, 16, 23, 512])
@pytest.mark.parametrize("num_prompt", [1, 4, 5, 8, 23])
def test_a_prompt_computed_here_gives_the_same_tokens_from_token_0(step_tokens: int, num_prompt: int) -> None:
    bench = DecodeBench(settings=settings(step_tokens))
    key = bench.submit(PROMPT[:num_prompt], transfer=False)
    assert bench.run() == -(-num_prompt // step_tokens) + 7
    bench.assert_complete(key, first_index=0)
    bench.assert_idle()


def test_a_failed_transfer_is_computed_here() -> None:
    bench = DecodeBench()
    before, after = bench.submit(PROMPT), bench.submit(PROMPT[1:])
    bench.fail(before)
    bench.want(after)
    bench.step()
    bench.fail(after, PeerLost("gone"))
    bench.run()
    bench.assert_complete(before, first_index=0)
    bench.assert_complete(after, first_index=0)
    bench.assert_idle()
    assert bench.worker.counters()["decode_local_prefills_total"] == 2


def test_a_failed_transfer_of_a_cached_prompt_computes_its_last_block_anew() -> None:
    """The failed transfer had pinned all of the prompt; computing needs at least one token."""
    bench = DecodeBench()
    bench.submit(PROMPT[:8], transfer=False)
    bench.run()
    key = bench.submit(PROMPT[:8])
    assert bench.receiver.transfers[key].have_tokens == 8
    bench.fail(key)
    bench.run()
    bench.assert_complete(key, first_index=0)
    assert bench.ledger.finishes[key].cached_tokens == 4


def test_without_permission_a_failed_transfer_is_an_error() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, allow_local_prefill=False)
    bench.want(key)
    bench.step()
    bench.fail(key, PeerLost("the prefill engine is gone"))
    assert bench.error_code(key) == "peer_lost"
    bench.assert_idle()


def test_a_cached_prefix_is_not_transferred() -> None:
    bench = DecodeBench()
    first = bench.submit(PROMPT)
    bench.transfer(first)
    bench.run()
    second = bench.submit([*PROMPT[:18], 9, 9])
    assert bench.receiver.transfers[second].have_tokens == 16
    bench.transfer(second)
    bench.run()
    bench.assert_complete(second, first_index=1)
    assert bench.ledger.finishes[second].cached_tokens == 16
    bench.assert_idle()


def test_a_wholly_cached_prompt_runs_without_a_grant() -> None:
    bench = DecodeBench()
    bench.submit(PROMPT[:8], transfer=False)
    bench.run()
    key = bench.submit(PROMPT[:8])
    bench.commit(key)
    bench.run()
    bench.assert_complete(key, first_index=1)
    assert bench.receiver.grants == []
    bench.assert_idle()


def test_generated_tokens_can_be_found_by_the_next_turn() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, transfer=False, max_tokens=10)
    bench.run()
    turn = [*PROMPT, *bench.ledger.tokens[key], 5]
    second = bench.submit(turn, transfer=False)
    bench.run()
    assert bench.ledger.finishes[second].cached_tokens == 32, "all but the last, incomplete block"
    bench.assert_complete(second, first_index=0)


def test_blocks_are_named_only_after_the_transfer_was_verified() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT)
    bench.want(key)
    bench.step()
    other = bench.submit(PROMPT)
    assert bench.receiver.transfers[other].have_tokens == 0
    bench.commit(key)
    third = bench.submit(PROMPT)
    assert bench.receiver.transfers[third].have_tokens == 20


def test_an_end_token_ends_the_request() -> None:
    bench = DecodeBench()
    tokens = echo_reference(PROMPT, 5)
    key = bench.submit(PROMPT, max_tokens=20, stop=[tokens[4]])
    bench.transfer(key)
    bench.run()
    bench.assert_complete(key, first_index=1)
    assert bench.ledger.finishes[key].num_tokens == 5
    bench.assert_idle()


def test_the_context_ends_the_request() -> None:
    bench = DecodeBench(max_context_tokens=len(PROMPT) + 6)
    key = bench.submit(PROMPT, max_tokens=20)
    bench.transfer(key)
    bench.run()
    assert bench.ledger.tokens[key] == echo_reference(PROMPT, 6)[1:]
    assert bench.ledger.finishes[key].reason is FinishReason.LENGTH
    bench.assert_idle()


@pytest.mark.parametrize("state", ["fetching", "wanting", "granted"])
def test_a_final_token_0_ends_silently_in_any_state(state: str) -> None:
    bench = DecodeBench(num_blocks=8)
    if state == "wanting":
        bench.submit(PROMPT, transfer=False, max_tokens=30)
        bench.step()
    key = bench.submit(PROMPT[2:])
    if state != "fetching":
        bench.want(key)
        bench.step()
        assert (bench.receiver.transfers[key].blocks is not None) == (state == "granted")
    bench.commit(key, final=True)
    finish = bench.ledger.finishes[key]
    assert (finish.reason, finish.num_tokens) == (FinishReason.CANCELLED, 1)
    assert key not in bench.ledger.tokens
    bench.run()
    bench.assert_idle()


def test_a_token_0_that_ends_the_request_here_ends_it_even_if_prefill_did_not_say_so() -> None:
    """Engines may differ in their context limit; nothing may be generated after the end."""
    bench = DecodeBench()
    key = bench.submit(PROMPT, stop=echo_reference(PROMPT, 1))
    bench.transfer(key)
    assert bench.ledger.finishes[key].reason is FinishReason.STOP
    assert key not in bench.ledger.tokens
    bench.assert_idle()


def widths(plan: tuple[tuple[object, ...], ...]) -> list[int]:
    """Tokens of each row; one whose token is not read yet has one."""
    return [len(row[2]) if isinstance(row[2], tuple) else 1 for row in plan]


def test_one_step_serves_all_decoding_rows_then_prompts() -> None:
    bench = DecodeBench(settings=settings(10))
    decoding = [bench.submit(PROMPT[at:], max_tokens=30) for at in range(3)]
    for key in decoding:
        bench.transfer(key)
    first, second = bench.submit([*PROMPT, 1], transfer=False), bench.submit(PROMPT[5:], transfer=False)
    bench.trace.clear()
    bench.step()
    assert widths(bench.trace[-1]) == [1, 1, 1, 4, 3], "20 tokens of the first prompt are cached"
    bench.step()
    assert widths(bench.trace[-1]) == [1, 1, 1, 1, 6]
    bench.run()
    for key in decoding:
        bench.assert_complete(key, first_index=1)
    for key in (first, second):
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


def test_a_small_budget_starves_nobody() -> None:
    """More seats than tokens in a step would leave the same sequences out again and again."""
    bench = DecodeBench(settings=settings(step_tokens=3, max_running=16))
    keys = [bench.submit(PROMPT[at:], transfer=False, max_tokens=12) for at in range(5)]
    for _ in range(4):
        bench.step()
    before = [len(plan) for plan in bench.trace]
    assert max(before) <= 3
    bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


@pytest.mark.parametrize("state", ["fetching", "wanting", "granted", "waiting", "ready", "prefilling", "decoding"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_an_early_end_in_any_state_leaves_nothing(state: str, how: str) -> None:
    bench = DecodeBench(num_blocks=32, settings=settings(step_tokens=10, max_running=1))
    bench.submit(PROMPT[:20], transfer=False, max_tokens=1)
    bench.run()  # something is cached, to be pinned
    prompt = [*PROMPT[:20], 4, 4, 4, 4, 4]
    transfer = state in {"fetching", "wanting", "granted", "ready"}
    blocker = None
    if state == "ready":
        blocker = bench.submit([3] * 5, transfer=False, max_tokens=12)
        bench.step()
    if state in {"wanting", "waiting"}:
        blocker = bench.submit([3] * 60, transfer=False, max_tokens=60)
        while not bench.ledger.tokens.get(blocker):
            bench.step()
        while bench.pool.counts().free + bench.pool.counts().cached > 7:
            bench.step()
    key = bench.submit(prompt, transfer=transfer, deadline=bench.clock() + 5, max_tokens=40)
    if state in {"wanting", "granted", "ready"}:
        bench.want(key)
        bench.step()
    if state == "ready":
        bench.commit(key)
    if state in {"waiting", "prefilling", "decoding"}:
        bench.step()
    if state == "decoding":
        bench.step()
    assert bench.worker._sequences[key].state.value == {"prefilling": "running", "decoding": "running"}.get(
        state, state
    )
    if how == "cancel":
        bench.cancel(key)
        assert bench.ledger.finishes[key].reason is FinishReason.CANCELLED
    else:
        assert bench.worker.next_wake() == bench.clock() + 5
        bench.clock.advance(5)
        bench.step()
        assert bench.error_code(key) == "deadline_exceeded"
    if state == "granted":
        assert len(bench.receiver.transfers[key].blocks or ()) == 7
        assert bench.pool.counts().used >= 7, "the receiver may still write"
    finish = bench.ledger.finishes[key]
    bench.cancel(key)
    bench.run()
    bench.end_transfers()
    bench.run()
    assert bench.ledger.finishes[key] is finish
    if blocker is not None:
        bench.assert_complete(blocker, first_index=0)
    bench.assert_tokens(key)
    bench.assert_idle()


@pytest.mark.parametrize("end", ["close", "commit", "commit_final", "fail"])
def test_a_cancelled_transfer_keeps_its_blocks_until_its_last_event(end: str) -> None:
    """The receiver fake writes garbage into granted blocks all the time: a block given away early would show it."""
    bench = DecodeBench(num_blocks=8)
    key = bench.submit(PROMPT)
    bench.want(key)
    bench.step()
    bench.cancel(key)
    bench.deliver(WantBlocks(key))  # not a last event
    other = bench.submit(PROMPT[2:], transfer=False)
    bench.run()
    assert other not in bench.ledger.tokens
    if end == "close":
        bench.deliver(bench.receiver.close(key))
    elif end == "fail":
        bench.fail(key)
    else:
        bench.commit(key, final=end == "commit_final")
    bench.run()
    bench.assert_complete(other, first_index=0)
    assert bench.ledger.finishes[key].reason is FinishReason.CANCELLED
    assert key not in bench.ledger.tokens
    bench.assert_idle()


@pytest.mark.parametrize("transfer", [True, False])
def test_an_id_outside_of_the_vocabulary_is_refused_before_it_can_fail_a_step_of_others(transfer: bool) -> None:
    bench = DecodeBench()
    stranger = bench.submit([5, bench.runner.vocab_size], transfer=transfer)
    assert bench.error_code(stranger) == "invalid_request"
    assert bench.submit([5, bench.runner.vocab_size - 1], transfer=transfer) not in bench.ledger.finishes


def test_a_full_queue_refuses() -> None:
    bench = DecodeBench(settings=settings(max_running=1, max_waiting=2))
    keys = [bench.submit(PROMPT, transfer=at % 2 == 0) for at in range(4)]
    assert set(bench.ledger.finishes) == {keys[3]}
    assert bench.error_code(keys[3]) == "overloaded"
    bench.cancel(keys[0])
    assert bench.submit(PROMPT) not in bench.ledger.finishes, "there is room again"


def test_an_ended_request_whose_blocks_a_silent_peer_may_still_fill_takes_no_place_in_the_queue() -> None:
    bench = DecodeBench(settings=settings(max_running=1, max_waiting=0))
    first = bench.submit(PROMPT)
    bench.want(first)
    bench.step()
    bench.cancel(first)
    assert bench.pool.counts().used, "it drains"
    assert bench.submit(PROMPT, transfer=False) not in bench.ledger.finishes


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "expected"),
    [(0, 8, "invalid_request"), (200, 8, "context_length_exceeded"), (37, 1, "no_kv_blocks"), (36, 2, "no_kv_blocks")],
)
@pytest.mark.parametrize("transfer", [True, False])
def test_an_impossible_request_ends_at_once(num_prompt: int, max_tokens: int, expected: str, transfer: bool) -> None:
    bench = DecodeBench(num_blocks=9)
    key = bench.submit([1] * num_prompt, transfer=transfer, max_tokens=max_tokens)
    assert bench.error_code(key) == expected
    bench.assert_idle()


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_step_that_raises_ends_its_rows_and_nobody_else(where: Literal["launch", "collect"]) -> None:
    bench = DecodeBench(settings=settings(max_running=2))
    running = [bench.submit(PROMPT, transfer=False), bench.submit(PROMPT[1:])]
    bench.transfer(running[1])
    waiting = bench.submit(PROMPT[2:], transfer=False)
    fetching = bench.submit(PROMPT[3:])
    bench.step()
    bench.runner.fault = where
    assert bench.step()
    bench.collect()
    assert [bench.error_code(key) for key in running] == ["engine_fault"] * 2
    for key in running:
        bench.assert_tokens(key)
    bench.run()
    bench.transfer(fetching)
    bench.run()
    bench.assert_complete(waiting, first_index=0)
    bench.assert_complete(fetching, first_index=1)
    bench.assert_idle()
    assert bench.worker.counters()["decode_step_faults_total"] == 1


def test_late_and_unknown_events_change_nothing() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=3)
    bench.want(key)
    bench.step()
    event = bench.receiver.commit(key, PROMPT, echo_reference(PROMPT, 1)[0])
    bench.deliver(event)
    bench.deliver(event)
    bench.run()
    bench.deliver(event)
    bench.cancel(key)
    bench.cancel(TransferKey(b"?" * 16))
    bench.assert_complete(key, first_index=1)
    assert len(bench.ledger.finishes) == 1
    bench.assert_idle()


def test_a_commit_without_a_grant_is_not_believed() -> None:
    """A peer that skips the grant has written nowhere: the prompt is computed here."""
    bench = DecodeBench()
    key = bench.submit(PROMPT)
    receiving = bench.receiver.transfers[key]
    receiving.blocks = ()
    receiving.num_tokens = receiving.have_tokens
    bench.commit(key)
    bench.run()
    bench.assert_complete(key, first_index=0)
    bench.assert_idle()


def test_a_second_order_with_a_living_key_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, transfer=False)
    request = bench.requests.pop(key)
    assert bench.submit(PROMPT, transfer=False) == key
    bench.requests[key] = request
    bench.run()
    assert "second decode order" in caplog.text
    bench.assert_complete(key, first_index=0)
    bench.assert_idle()


def test_at_most_max_running_sequences_are_in_a_step_and_a_successor_is_ready() -> None:
    bench = DecodeBench(settings=settings(max_running=2))
    keys = [bench.submit(PROMPT[at:], max_tokens=6) for at in range(5)]
    for key in keys:
        bench.want(key)
    bench.step()
    assert bench.receiver.grants == keys[:3], "two seats and one successor"
    for key in keys[:3]:
        bench.commit(key)
    while len(bench.receiver.transfers) or bench.step():
        for key in [key for key, one in bench.receiver.transfers.items() if one.blocks is not None]:
            bench.commit(key)
        bench.step()
    assert max(len(plan) for plan in bench.trace) == 2
    for key in keys:
        bench.assert_complete(key, first_index=1)
    bench.assert_idle()


def test_times_and_bytes_are_reported() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, max_tokens=3)
    bench.clock.advance(1)
    bench.want(key)
    bench.step()
    bench.clock.advance(2)
    bench.commit(key)
    bench.clock.advance(4)
    bench.step()
    bench.clock.advance(8)
    bench.step()
    bench.collect()
    finish = bench.ledger.finishes[key]
    times = finish.times
    assert (times.queue, times.transfer, times.prefill, times.decode) == (5, 2, 0, 8)
    assert (finish.transfer_bytes, finish.transport) == (2300, "fake")


def test_the_time_of_a_local_prompt_is_prefill_until_its_token_is_read(depth: int) -> None:
    bench = DecodeBench(settings=settings(20))
    bench.submit(PROMPT, max_tokens=2, transfer=False)
    bench.clock.advance(1)
    bench.step()
    bench.clock.advance(2)
    bench.step()
    bench.clock.advance(4)
    bench.step()
    bench.collect()
    (finish,) = bench.ledger.finishes.values()
    read_at_once = depth == 1
    expected = (1, 2, 4) if read_at_once else (1, 6, 0)
    assert (finish.times.queue, finish.times.prefill, finish.times.decode) == expected
