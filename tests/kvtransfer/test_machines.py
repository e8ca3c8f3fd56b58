"""Sender and receiver machines on a virtual clock: every situation of the protocol, then weather."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diptych.kvtransfer.messages import (
    Abort,
    AbortAck,
    ChunkAck,
    ChunkReady,
    ChunkStatus,
    Expect,
    FinalAck,
    Heartbeat,
    Message,
    PrefillFinished,
)
from diptych.kvtransfer.testing import HingePair, Weather
from diptych.protos.errors import (
    Cancelled,
    ChecksumMismatch,
    EngineFault,
    Fenced,
    PeerLost,
    TransferError,
    TransferTimeout,
)
from diptych.protos.ports import Closed, Committed, Released
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey


def key(number: int = 1, attempt: int = 0) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"), attempt)


def said(pair: HingePair, by: str, kind: type) -> int:
    return sum(who == by and isinstance(message, kind) for who, message in pair.sent)


# ---- the good ways ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["expect first", "open first", "computed first", "finished first"])
def test_expect_may_come_at_any_time(order: str) -> None:
    pair = HingePair()
    steps: list[Callable[[], None]] = [
        lambda: pair.open(key(), 10),
        lambda: pair.compute(key(), 10),
        lambda: pair.finish(key()),
    ]
    at = ["expect first", "open first", "computed first", "finished first"].index(order)
    steps.insert(at, lambda: pair.expect(key(), 10))
    for step in steps:
        step()
        pair.run(1)
    assert pair.outcomes[key()] == Committed(key(), 77, False, 80, pair.outcomes[key()].seconds, "test")  # type: ignore[union-attr]
    released = pair.released[key()]
    assert (released.error, released.size_bytes, released.transport) == (None, 80, "test")
    pair.check_quiet()


def test_only_what_the_peer_lacks_is_staged() -> None:
    pair = HingePair()
    pair.whole(key(), 10, have_tokens=6)
    pair.run(1)
    assert pair.released[key()].size_bytes == 4 * 8
    chunks = [message for _, message in pair.sent if isinstance(message, ChunkReady)]
    assert [(chunk.tok_from, chunk.tok_to) for chunk in chunks] == [(6, 10)]
    pair.check_quiet()


def test_a_prompt_that_the_peer_caches_whole_needs_no_chunk_and_no_blocks() -> None:
    pair = HingePair()
    pair.whole(key(), 10, have_tokens=10)
    pair.run(1)
    assert pair.committed(key())
    assert not pair.wanted
    assert said(pair, "p", ChunkReady) == 0
    pair.check_quiet()


def test_chunks_overlap_with_computation_and_blocks_are_asked_for_once() -> None:
    pair = HingePair()
    pair.expect(key(), 12)
    pair.open(key(), 12)
    pair.compute(key(), 5)
    pair.run(1)
    assert pair.wanted == [key()]
    assert said(pair, "d", ChunkAck) == 2  # the full chunk, then the odd token, as nothing else was out
    pair.compute(key(), 12)
    pair.finish(key())
    pair.run(1)
    assert pair.wanted == [key()]
    assert pair.committed(key())
    pair.check_quiet()


@pytest.mark.parametrize("when", ["before expect", "after expect", "after chunks"])
def test_token_0_that_ends_the_request_moves_nothing(when: str) -> None:
    pair = HingePair()
    pair.open(key(), 10)
    if when != "before expect":
        pair.expect(key(), 10)
        pair.run(1)
    if when == "after chunks":
        pair.auto_grant = False
        pair.compute(key(), 8)
        pair.run(1)
        assert pair.sender.ledger.num_busy == 2
    pair.finish(key(), 5, final=True)
    pair.run(0.1)
    assert pair.released[key()].error is None
    if when == "before expect":
        pair.expect(key(), 10)
    pair.run(0.1)
    assert pair.outcomes[key()] == Committed(key(), 5, final=True)
    pair.run(1)
    pair.check_quiet()


def test_without_a_free_slot_the_kv_waits_in_its_blocks() -> None:
    pair = HingePair(auto_grant=False)
    for number in range(3):
        pair.whole(key(number), 12)  # three chunks each, four slots
    pair.run(1)
    assert pair.sender.ledger.num_busy == 4
    assert not pair.released
    for number in (1, 0, 2):  # 2 has no slot, so that nobody asked for its blocks yet
        pair.grant(key(number))
        pair.run(1)
    pair.grant(key(2))
    pair.run(1)
    assert all(pair.committed(key(number)) for number in range(3))
    pair.check_quiet()


def test_prompts_without_blocks_cannot_keep_all_slots_from_one_that_has_them() -> None:
    pair = HingePair(auto_grant=False, settings=TransferSettings(slots=2))
    first, second = key(1), key(2)
    for one in (first, second):
        pair.expect(one, 20)
        pair.open(one, 20)
    pair.compute(first, 4)
    pair.compute(second, 20)  # most of it was cached
    pair.run(1)
    assert pair.wanted == [first, second]
    pair.grant(first)  # which leaves no room for the second until the first has been answered
    pair.run(1)
    pair.compute(first, 20)
    pair.finish(first)
    pair.finish(second)
    pair.run(1)
    assert pair.committed(first)
    pair.grant(second)
    pair.run(1)
    assert pair.committed(second)
    pair.check_quiet()


# ---- cancel and errors ------------------------------------------------------------------------


def test_an_abort_at_d_frees_both_ends() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 10)
    pair.run(1)
    pair.abort_d(key(), Cancelled("gone"))
    assert pair.closed(key())
    pair.run(0.1)
    assert isinstance(pair.released[key()].error, Cancelled)
    pair.check_quiet()


def test_an_abort_at_p_releases_at_once_and_keeps_announced_slots_until_the_answer() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 8)
    pair.run(1)
    pair.abort_p(key(), EngineFault("boom"))
    assert isinstance(pair.released[key()].error, EngineFault)
    assert pair.sender.ledger.num_busy == 2
    pair.run(0.1)
    assert isinstance(pair.failure(key()), EngineFault)
    pair.check_quiet()


def test_an_abort_that_nobody_answers_ends_in_quarantine_and_a_new_generation() -> None:
    pair = HingePair(auto_grant=False, settings=TransferSettings(slots=4, silence_s=1000))
    pair.whole(key(), 8)
    pair.run(1)
    generations = [slot.generation for slot in pair.sender.ledger.slots]
    pair._up.clear()  # the stream hangs: nothing arrives, nobody is told
    pair.abort_p(key(), EngineFault("boom"))
    pair.run(pair.settings.abort_ack_s - 0.5)
    assert pair.sender.ledger.num_busy == 2
    pair.run(1)
    assert pair.sender.ledger.num_busy == 0
    assert sum(slot.generation for slot in pair.sender.ledger.slots) == sum(generations) + 2
    assert pair.sender.counters["kv_quarantine_timeouts_total"] == 1


def test_an_abort_waits_for_the_copy_under_way_and_for_nothing_else() -> None:
    pair = HingePair(weather=Weather(copy_s=1.0), seed=3)
    pair.expect(key(), 4)
    pair.open(key(), 4)
    pair.run(0.1)
    pair.compute(key(), 4)
    pair.abort_p(key(), EngineFault("boom"))
    assert key() not in pair.released  # a gather reads the blocks
    pair.run(1.2)
    assert isinstance(pair.released[key()].error, EngineFault)
    assert said(pair, "p", ChunkReady) == 0
    pair.check_quiet()


def test_d_closes_only_when_its_last_write_is_over() -> None:
    pair = HingePair(weather=Weather(copy_s=1.0))
    pair.whole(key(), 4)
    for _ in range(400):
        pair.run(0.01)
        if said(pair, "d", ChunkAck):
            break
    pair.abort_d(key(), Cancelled("gone"))
    assert key() not in pair.outcomes  # a scatter writes into the blocks
    pair.run(1.5)
    assert pair.closed(key())
    pair.check_quiet()


def test_d_confirms_an_abort_only_when_no_fetch_reads_the_slot() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 4)
    pair.run(0.5)
    pair.weather.copy_s = 1.0
    pair.grant(key())
    pair.abort_p(key(), EngineFault("boom"))
    pair.run(0.01)
    assert isinstance(pair.failure(key()), EngineFault)  # nothing writes, so that D's blocks are free at once
    assert said(pair, "d", AbortAck) == 0
    assert pair.sender.ledger.num_busy == 1
    pair.run(1)
    assert said(pair, "d", AbortAck) == 1
    assert not pair._d_kv
    pair.check_quiet()


def test_p_learns_of_a_cancel_before_it_has_opened_and_the_other_way_round() -> None:
    pair = HingePair()
    pair.expect(key(1), 10)
    pair.run(0.1)
    pair.abort_d(key(1), Cancelled("gone"))
    pair.run(0.1)
    pair.open(key(1), 10)
    assert isinstance(pair.released[key(1)].error, Cancelled)
    pair.sender.abort(key(2), EngineFault("refused"), pair.now)  # an order that ended before its transfer began
    pair.expect(key(2), 10)
    pair.run(0.1)
    assert isinstance(pair.failure(key(2)), EngineFault)
    pair.check_quiet()


def test_commands_after_the_end_do_nothing() -> None:
    pair = HingePair()
    pair.whole(key(), 10)
    pair.run(1)
    for _ in range(2):
        pair.sender.computed(key(), 10, (0, 1, 2), pair.now)
        pair.finish(key())
        pair.abort_p(key(), Cancelled("late"))
        pair.abort_d(key(), Cancelled("late"))
        pair.receiver.grant(key(), (0, 1, 2, 3), pair.now)
        pair.run(0.2)
    assert pair.committed(key())
    pair.check_quiet()


def test_a_key_is_used_once() -> None:
    pair = HingePair()
    pair.whole(key(), 10)
    pair.run(1)
    first = pair.released.pop(key()), pair.outcomes.pop(key())
    pair.open(key(), 10)
    pair.expect(key(), 10)
    assert isinstance(pair.released[key()].error, Fenced)
    assert isinstance(pair.failure(key()), Fenced)
    assert first[0].error is None


# ---- lost and late ----------------------------------------------------------------------------


def test_a_broken_stream_fails_its_transfers_at_both_ends_and_the_next_one_dials_anew() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(1), 10)
    pair.run(1)
    pair.break_stream()
    pair.run(0.3)
    assert isinstance(pair.failure(key(1)), PeerLost)
    assert isinstance(pair.released[key(1)].error, PeerLost)
    pair.check_quiet()
    pair.auto_grant = True
    pair.whole(key(2), 10)
    pair.run(1)
    assert pair.committed(key(2))
    pair.check_quiet()


def test_nobody_at_the_other_end_is_told_in_time() -> None:
    pair = HingePair()
    pair.reachable = False
    pair.expect(key(1), 10)
    pair.run(0.1)
    assert isinstance(pair.failure(key(1)), TransferError)


def test_a_dial_that_never_ends_is_not_waited_for() -> None:
    pair = HingePair()
    pair._dial = lambda peer: None  # type: ignore[method-assign]
    pair.expect(key(1), 10)
    pair.run(pair.settings.dial_timeout_s + 0.3)
    assert isinstance(pair.failure(key(1)), PeerLost)


def test_a_placement_that_names_a_dead_life_fails_at_once_and_a_new_life_replaces_the_old() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(1), 10)
    pair.run(0.5)
    new_life = EngineRef(pair.p.engine_id, pair.p.epoch + 1, pair.p.target)
    old_life, pair.p = pair.p, new_life
    pair.expect(key(2), 10)
    assert isinstance(pair.failure(key(1)), PeerLost)
    pair.run(0.5)
    pair.p = old_life
    pair.expect(key(3), 10)
    assert isinstance(pair.failure(key(3)), PeerLost)


def test_a_silent_peer_costs_a_lease_and_its_late_fetch_is_torn() -> None:
    pair = HingePair(auto_grant=False, settings=TransferSettings(slots=4, stall_s=1000, silence_s=1000))
    pair.whole(key(), 8)
    pair.run(1)
    pair._up.clear()  # P hears nothing of D any more, though the stream seems to stand
    pair.run(pair.settings.lease_s + 1)
    assert isinstance(pair.released[key()].error, TransferTimeout)
    assert pair.sender.counters["kv_lease_expired_total"] == 1
    assert pair.sender.ledger.num_busy == 0
    pair.grant(key())  # D wakes up
    pair.run(1)
    assert isinstance(pair.failure(key()), ChecksumMismatch)
    assert pair.receiver.counters["kv_torn_reads_total"] >= 2


def test_heartbeats_keep_a_slow_grant_and_a_slow_prefill_alive() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(1), 10)
    pair.expect(key(2), 10)
    pair.open(key(2), 10)
    pair.run(200)  # many leases and stalls
    pair.grant(key(1))
    pair.run(1)
    assert pair.committed(key(1))
    pair.compute(key(2), 10)
    pair.finish(key(2))
    pair.run(1)
    pair.grant(key(2))
    pair.run(1)
    assert pair.committed(key(2))
    pair.check_quiet()


def test_a_request_that_p_was_never_given_ends_after_a_lease() -> None:
    pair = HingePair()
    pair.expect(key(), 10)
    pair.run(pair.settings.lease_s - 1)
    assert key() not in pair.outcomes
    pair.run(2)
    assert isinstance(pair.failure(key()), TransferTimeout)
    pair.check_quiet()


def test_a_p_that_says_nothing_of_a_transfer_is_a_stall() -> None:
    pair = HingePair(settings=TransferSettings(slots=4, silence_s=1000))
    pair.open(key(), 10)
    pair.expect(key(), 10)
    pair.run(1)
    pair.sender.on_message = lambda link, message, now: None  # type: ignore[method-assign]
    pair.run(pair.settings.stall_s + 4)
    assert isinstance(pair.failure(key()), TransferTimeout)


def test_d_learns_from_the_next_heartbeat_that_p_has_forgotten() -> None:
    pair = HingePair()
    pair.expect(key(), 10)
    pair.run(0.1)
    pair.sender._early.clear()
    pair.run(pair.settings.heartbeat_s)
    assert isinstance(pair.failure(key()), TransferError)


# ---- integrity --------------------------------------------------------------------------------


def test_an_altered_chunk_is_fetched_once_more_from_the_same_slot() -> None:
    pair = HingePair(weather=Weather(corrupt=1.0), auto_grant=False)
    pair.whole(key(), 4)
    pair.run(1)
    draws = iter([0.0, 1.0])
    pair.rng.random = lambda: next(draws, 1.0)  # type: ignore[method-assign]
    pair.weather.corrupt = 0.5
    pair.grant(key())
    pair.run(1)
    assert pair.committed(key())
    assert pair.receiver.counters["kv_checksum_failures_total"] == 1
    assert pair.sender.counters["kv_checksum_failures_total"] == 1
    pair.check_quiet()


def test_a_chunk_altered_twice_ends_the_transfer_without_a_write() -> None:
    pair = HingePair(weather=Weather(corrupt=1.0))
    pair.whole(key(), 4)
    pair.run(1)
    assert isinstance(pair.failure(key()), ChecksumMismatch)
    assert pair.receiver.counters["kv_checksum_failures_total"] == 2
    assert not pair._d_kv
    assert pair.released[key()].error is not None
    pair.check_quiet()


def ready(pair: HingePair, chunk: int, tok_from: int, tok_to: int, size: int | None = None) -> ChunkReady:
    size_bytes = (tok_to - tok_from) * 8 if size is None else size
    return ChunkReady(key(), chunk, tok_from, tok_to, chunk, 1, size_bytes, 0)


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([(0, 2, 6)], "nobody wants"),  # before have_tokens
        ([(0, 8, 12)], "nobody wants"),  # beyond the prompt
        ([(0, 6, 6)], "nobody wants"),
        ([(0, 4, 8, 7)], "has 7 bytes"),
        ([(0, 4, 8), (0, 8, 10)], "announced twice"),
        ([(0, 4, 8), (1, 9, 10)], "do not cover"),
        ([(0, 4, 8), (2, 8, 10)], "do not cover"),
        ([(0, 4, 10), (1, 8, 10), (2, 9, 10)], "do not cover"),
        ([(0, 4, 9), (1, 8, 10)], "do not cover"),
    ],
)
def test_announcements_that_make_no_sense_end_the_transfer(chunks: list[tuple[int, ...]], words: str) -> None:
    pair = HingePair(auto_grant=False)
    pair.expect(key(), 10, have_tokens=4)
    pair.run(0.1)
    for chunk in chunks:
        pair.inject("d", ready(pair, *chunk))
    pair.inject("d", PrefillFinished(key(), 2, 10, 1, final=False))
    assert words in str(pair.failure(key()))
    assert said(pair, "d", Abort) == 1


def test_another_prompt_length_or_too_few_chunks_is_never_committed() -> None:
    pair = HingePair()
    pair.expect(key(), 10)
    pair.run(0.1)
    pair.inject("d", PrefillFinished(key(), 0, 9, 1, final=False))
    assert "9 tokens, not 10" in str(pair.failure(key()))
    pair = HingePair()
    pair.expect(key(), 10)
    pair.run(0.1)
    pair.inject("d", PrefillFinished(key(), 0, 10, 1, final=False))
    assert "do not cover" in str(pair.failure(key()))


def test_a_grant_that_is_too_short_ends_the_transfer() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 10)
    pair.run(1)
    pair.receiver.grant(key(), (1, 2, 3), pair.now)
    pair._settle()
    assert "3 blocks for 10 tokens" in str(pair.failure(key()))


# ---- fencing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", [{"epoch": 4}, {"epoch": 99}, {"pair_epoch": 0}, {"pair_epoch": 9}])
def test_another_life_changes_nothing_and_is_counted(fence: dict[str, int]) -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 10)
    pair.run(0.5)
    before = len(pair.sent)
    abort = Abort(key(), "cancelled", "")
    to_p: list[Message] = [Expect(key(7), 0), FinalAck(key()), abort, AbortAck(key()), Heartbeat((key(9),))]
    to_d: list[Message] = [abort, AbortAck(key()), PrefillFinished(key(), 0, 10, 1, final=True), Heartbeat((key(),))]
    for message in to_p:
        pair.inject("p", message, **fence)
    for message in to_d:
        pair.inject("d", message, **fence)
    assert pair.sender.counters["kv_fenced_messages_total"] == len(to_p)
    assert pair.receiver.counters["kv_fenced_messages_total"] == len(to_d)
    assert len(pair.sent) == before
    assert not pair.outcomes
    assert not pair.released


def test_an_older_attempt_is_fenced_and_a_newer_one_replaces_it() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(1, 0), 10)
    pair.run(0.5)
    pair.auto_grant = True
    pair.whole(key(1, 1), 10)
    assert isinstance(pair.released[key(1, 0)].error, Fenced)
    assert isinstance(pair.failure(key(1, 0)), Fenced)
    pair.inject("p", Expect(key(1, 0), 0))
    pair.inject("d", PrefillFinished(key(1, 0), 0, 10, 1, final=True))
    assert pair.sender.counters["kv_fenced_messages_total"] >= 1
    assert pair.receiver.counters["kv_fenced_messages_total"] >= 1
    pair.run(3)
    assert pair.committed(key(1, 1))
    pair.check_quiet()


def test_an_ack_for_another_generation_frees_nothing() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 4)
    pair.run(0.5)
    chunk = next(message for _, message in pair.sent if isinstance(message, ChunkReady))
    for slot, gen in ((chunk.slot, chunk.slot_gen + 1), (chunk.slot + 1, chunk.slot_gen)):
        pair.inject("p", ChunkAck(key(), 0, slot, gen, ChunkStatus.OK))
    assert pair.sender.ledger.num_busy == 1
    assert pair.sender.counters["kv_fenced_messages_total"] == 2


def test_a_final_ack_before_the_end_releases_nothing() -> None:
    pair = HingePair()
    pair.expect(key(), 10)
    pair.open(key(), 10)
    pair.run(0.5)
    pair.inject("p", FinalAck(key()))
    assert not pair.released
    pair.compute(key(), 10)
    pair.finish(key())
    pair.run(0.5)
    assert pair.committed(key())
    pair.check_quiet()


def test_a_transfer_meant_for_another_engine_is_not_given_away() -> None:
    pair = HingePair()
    owned = EngineRef(EngineId("d1"), 1, "")
    pair.sender.open(key(), owned, 10, pair.now)
    pair.expect(key(), 10)
    pair.run(0.5)
    assert isinstance(pair.failure(key()), Fenced)
    assert said(pair, "p", ChunkReady) == 0
    pair.sender.abort(key(), Cancelled(""), pair.now)
    event = next(action.event for action in pair.sender.take_actions() if hasattr(action, "event"))
    assert isinstance(event, Released)


def test_words_of_the_wrong_end_and_unknown_transfers_are_answered_or_dropped() -> None:
    pair = HingePair()
    pair.whole(key(1), 4)
    pair.run(1)
    pair.inject("p", ready(pair, 0, 0, 4))
    pair.inject("d", Expect(key(1), 0))
    assert pair.sender.counters["kv_fenced_messages_total"] == 1
    assert pair.receiver.counters["kv_fenced_messages_total"] == 1
    before = len(pair.sent)
    pair.inject("p", ChunkAck(key(50), 0, 0, 1, ChunkStatus.OK))
    pair.inject("p", FinalAck(key(51)))
    pair.inject("p", Heartbeat((key(52),)))
    pair.inject("d", ChunkReady(key(53), 0, 0, 4, 0, 1, 32, 0))
    answers = [message for _, message in pair.sent[before:] if isinstance(message, Abort)]
    assert [answer.key for answer in answers] == [key(50), key(51), key(52), key(53)]
    pair.inject("p", Abort(key(54), "cancelled", ""))
    assert pair.sent[-1][1] == AbortAck(key(54))


def test_closed_is_the_only_answer_to_an_abort_that_comes_first() -> None:
    pair = HingePair()
    pair.expect(key(), 10)
    pair.abort_d(key(), Cancelled("gone"))
    assert pair.outcomes[key()] == Closed(key())
    pair.run(1)
    pair.check_quiet()
