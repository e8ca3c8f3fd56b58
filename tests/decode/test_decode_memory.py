"""Blocks are scarce: who gives way, who comes next, and why the line of those who wait cannot stand still."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from diptych.decode.testing import DecodeBench
from diptych.kvtransfer.pool import BlockTable
from diptych.protos.settings import DecodeSettings
from diptych.protos.testing import echo_reference

PROMPT = list(range(100, 123))  # 23 tokens: 5 full blocks of 4 and a rest


def settings(step_tokens: int = 512, max_running: int = 16, max_waiting: int = 256) -> DecodeSettings:
    return DecodeSettings(step_tokens=step_tokens, max_running=max_running, max_waiting=max_waiting)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_blocks", [9, 10, 12, 17])
def test_preemption_under_a_tiny_pool_gives_the_same_tokens(num_blocks: int, prefix_cache: bool) -> None:
    bench = DecodeBench(num_blocks=num_blocks, prefix_cache=prefix_cache)
    keys = [bench.submit(PROMPT[at * 5 : at * 5 + 6], transfer=False, max_tokens=25) for at in range(4)]
    bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=0)
    assert bench.worker.counters()["decode_preemptions_total"] > 0
    bench.assert_idle()


def test_a_prompt_that_is_preempted_on_its_way_tells_once_what_it_found_in_the_cache(depth: int) -> None:
    bench = DecodeBench(num_blocks=12, settings=settings(step_tokens=6))
    prompt = PROMPT[:16]
    bench.submit(prompt, transfer=False, max_tokens=1)
    low = bench.submit(prompt, transfer=False, max_tokens=1, priority=1)
    for _ in range(3):
        bench.step()
    # The first one's blocks took the place of its own; then somebody urgent needs the whole pool, and a twin follows.
    bench.submit(range(200, 247), transfer=False, max_tokens=1)
    bench.submit(prompt, transfer=False, max_tokens=1)
    bench.run()
    finish = bench.ledger.finishes[low]
    named = {1: 12, 2: 4}[depth]  # of the first one's tokens, when the second began: those of collected steps
    assert (finish.preemptions, finish.cached_tokens) == (1, named)
    bench.assert_complete(low, first_index=0)
    bench.assert_idle()


def test_preemption_after_transfers_gives_the_same_tokens() -> None:
    bench = DecodeBench(num_blocks=14, settings=settings(step_tokens=7))
    keys = [bench.submit(PROMPT[at:][:18], max_tokens=16) for at in range(2)]
    for key in keys:
        bench.transfer(key)
    bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=1)
    assert bench.worker.counters()["decode_preemptions_total"] > 0
    bench.assert_idle()


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    bench = DecodeBench(num_blocks=9)
    old = bench.submit(PROMPT[:12], transfer=False, max_tokens=20)
    young = bench.submit(PROMPT[8:20], transfer=False, max_tokens=20)
    bench.step()
    late = bench.submit([7] * 9, transfer=False, max_tokens=9)
    while not bench.worker.counters()["decode_preemptions_total"]:
        assert bench.step()
    bench.collect()
    assert late not in bench.ledger.tokens
    assert len(bench.ledger.tokens[young]) < len(bench.ledger.tokens[old])
    line = bench.worker._scheduler.all.line
    assert {one.key for one in line} == {young, late}
    assert (head := line.head()) is not None
    assert head.key == young
    bench.run()
    for key in (old, young, late):
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


def test_the_seat_of_one_that_gave_way_goes_to_one_that_is_ready() -> None:
    """The only one that runs is the youngest and lacks a block; the step must not be lost."""
    bench = DecodeBench(num_blocks=13, settings=settings(max_running=1))
    ready = bench.submit(PROMPT, max_tokens=5)
    running = bench.submit([5] * 12, transfer=False, max_tokens=30)
    bench.step()
    bench.transfer(ready)
    while not bench.worker.counters()["decode_preemptions_total"]:
        assert bench.step()
    bench.collect()
    assert len(bench.ledger.tokens[ready]) == 1
    bench.run()
    bench.assert_complete(ready, first_index=1)
    bench.assert_complete(running, first_index=0)
    bench.assert_idle()


def test_one_that_is_ready_gives_way_to_an_older_one_that_runs(depth: int) -> None:
    bench = DecodeBench(num_blocks=13, settings=settings(max_running=1))
    running = bench.submit([5] * 12, transfer=False, max_tokens=30)
    bench.step()
    ready = bench.submit(PROMPT, max_tokens=5)
    bench.transfer(ready)
    for num_tokens in range(3, 31):
        bench.step()
        launched = len(bench.ledger.tokens[running]) + bench.pipeline.num_outstanding
        assert launched == num_tokens, "the older one never loses a step"
    assert bench.worker.counters()["decode_preemptions_total"] == 1
    bench.run()
    bench.assert_complete(ready, first_index=1)
    bench.assert_complete(running, first_index=0)
    bench.assert_idle()


def test_a_blocked_prompt_is_not_named_again_until_the_pool_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DecodeBench(num_blocks=10)
    bench.submit(PROMPT[:5], transfer=False, max_tokens=3)
    blocked = bench.submit(list(range(30)), transfer=False)
    bench.step()
    opened: list[int] = []
    real = bench.pool.open

    def spy(prompt: Sequence[int], salt: bytes, *, max_cached_tokens: int) -> BlockTable:
        opened.append(len(prompt))
        return real(prompt, salt, max_cached_tokens=max_cached_tokens)

    monkeypatch.setattr(bench.pool, "open", spy)
    bench.step()
    assert not opened
    bench.run()
    assert opened == [30]
    bench.assert_complete(blocked, first_index=0)


def test_one_that_outgrew_the_pool_while_it_shared_blocks_cannot_stop_the_line(depth: int) -> None:
    """It gave way to an older one in the step in which it outgrew the pool: at the head of the line it never fits."""
    bench = DecodeBench(num_blocks=6)
    bench.submit(PROMPT[:20], transfer=False, max_tokens=1)
    bench.run()
    older = bench.submit(PROMPT[:20], max_tokens=3)
    big = bench.submit(PROMPT[:20], transfer=False, max_tokens=20)
    while len(bench.ledger.tokens.get(big, [])) + depth < 6:
        bench.step()
    assert bench.pool.counts().used == 6
    bench.commit(older)
    bench.run()
    assert bench.error_code(big) == "no_kv_blocks"
    bench.assert_complete(older, first_index=1)
    bench.assert_idle()


def test_a_sequence_that_outgrows_the_whole_pool_is_an_error() -> None:
    bench = DecodeBench(num_blocks=7)
    key = bench.submit(PROMPT, transfer=False, max_tokens=20)
    bench.run()
    assert bench.error_code(key) == "no_kv_blocks"
    assert bench.ledger.tokens[key] == echo_reference(PROMPT, 6), (
        "28 slots hold 23 tokens and 5 more; the 6th needs none"
    )
    bench.assert_idle()


def test_outgrowing_the_pool_lets_the_next_in_line_run() -> None:
    bench = DecodeBench(num_blocks=7)
    key = bench.submit(PROMPT, transfer=False, max_tokens=20)
    other = bench.submit(PROMPT[3:], transfer=False)
    bench.run()
    assert bench.error_code(key) == "no_kv_blocks"
    bench.assert_complete(other, first_index=0)


def test_grants_are_given_to_those_whose_first_chunk_is_there_in_order_of_arrival() -> None:
    bench = DecodeBench(num_blocks=14)
    keys = [bench.submit(PROMPT[at:][:20], max_tokens=2) for at in range(4)]
    for key in (keys[3], keys[0], keys[2]):
        bench.want(key)
    bench.step()
    assert bench.receiver.grants == [keys[0], keys[2]]
    bench.want(keys[1])
    bench.commit(keys[0])
    bench.run()
    assert bench.receiver.grants == [keys[0], keys[2], keys[1]]
    bench.commit(keys[2])
    bench.commit(keys[1])
    bench.run()
    assert bench.receiver.grants == [keys[0], keys[2], keys[1], keys[3]]
    bench.commit(keys[3])
    bench.run()
    for key in keys:
        bench.assert_complete(key, first_index=1)
    bench.assert_idle()


def test_a_grant_leaves_room_for_those_that_run() -> None:
    bench = DecodeBench(num_blocks=12)
    running = bench.submit(PROMPT, transfer=False, max_tokens=3)
    bench.step()
    key = bench.submit([*PROMPT[1:], 1])
    bench.want(key)
    bench.step()
    assert bench.receiver.grants == [], "six blocks are free, six are needed, and one is kept"
    bench.run()
    assert bench.receiver.grants == [key], "alone it may have the whole pool"
    bench.assert_complete(running, first_index=0)
    bench.commit(key)
    bench.run()
    bench.assert_complete(key, first_index=1)


def test_pinned_prefixes_cannot_stop_the_line() -> None:
    """Waiting transfers hold the cached prefixes that the head of the line lacks: the youngest gives way."""
    bench = DecodeBench(num_blocks=10)
    prefixes = [PROMPT[:16], PROMPT[7:23]]
    for prefix in prefixes:
        bench.submit(prefix, transfer=False, max_tokens=1)
        bench.run()
    head = bench.submit([1] * 20, max_tokens=3)
    behind = [bench.submit([*prefix, 8], max_tokens=3) for prefix in prefixes]
    assert [bench.receiver.transfers[key].have_tokens for key in behind] == [16, 16]
    for key in (head, *behind):
        bench.want(key)
    bench.run()
    assert bench.receiver.grants == [head]
    assert bench.receiver.transfers[behind[1]].aborted is not None
    assert bench.receiver.transfers[behind[0]].aborted is None
    bench.commit(head)
    bench.run()
    bench.deliver(bench.receiver.close(behind[1]))
    bench.commit(behind[0])
    bench.run()
    bench.assert_complete(head, first_index=1)
    bench.assert_complete(behind[0], first_index=1)
    bench.assert_complete(behind[1], first_index=0)
    bench.assert_idle()


def test_a_prefix_that_gives_way_is_an_error_where_nothing_may_be_computed_here() -> None:
    bench = DecodeBench(num_blocks=6)
    bench.submit(PROMPT[:16], transfer=False, max_tokens=1)
    bench.run()
    head = bench.submit([1] * 20, max_tokens=3)
    behind = bench.submit([*PROMPT[:16], 8], allow_local_prefill=False)
    bench.want(head)
    bench.run()
    assert bench.error_code(behind) == "no_kv_blocks"
    bench.commit(head)
    bench.run()
    bench.end_transfers()
    bench.assert_idle()


def test_a_prefix_that_gave_way_where_nothing_may_be_computed_does_not_run() -> None:
    """With two prefixes gone there is room for the smaller prompt at once; its transfer was its only way."""
    bench = DecodeBench(num_blocks=8)
    bench.submit(PROMPT[:16], transfer=False, max_tokens=1)
    bench.run()
    bench.submit([3] * 4, transfer=False, max_tokens=1)
    bench.run()
    head = bench.submit([1] * 20, max_tokens=3)
    large = bench.submit([*PROMPT[:16], 8])
    small = bench.submit([*[3] * 4, 8], allow_local_prefill=False)
    bench.want(head)
    bench.run()
    assert bench.receiver.grants == [head]
    assert bench.error_code(small) == "no_kv_blocks"
    assert small not in bench.ledger.tokens
    bench.commit(head)
    bench.run()
    bench.end_transfers()
    bench.run()
    bench.assert_complete(large, first_index=0)
    bench.assert_idle()
