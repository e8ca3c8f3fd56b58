"""A peer that stops without a word: both ends notice in time, idle or not; a starved watcher blames nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diptych.kvtransfer.blame import Blame
from diptych.kvtransfer.messages import Abort, ChunkAck, ChunkStatus, Expect, Heartbeat, Link, Message, PrefillFinished
from diptych.kvtransfer.pulse import TICK_S, Pulse
from diptych.kvtransfer.testing import HingePair, Weather
from diptych.protos.errors import PeerLost
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

DECIDED_S = 1.5
LINK = Link(EngineId("p0"), 5, 1)


def key(number: int = 1, attempt: int = 0) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"), attempt)


def stop(pair: HingePair, who: str) -> None:
    """The process hears, does and says nothing any more; its streams stand."""
    machine = pair.sender if who == "p" else pair.receiver
    for name in ("on_message", "tick", "heard", "pair_down"):
        setattr(machine, name, lambda *args: None)


def idle(pair: HingePair) -> None:
    pair.whole(key(), 4)
    pair.run(30)
    assert pair.committed(key())


def waiting_for_blocks(pair: HingePair) -> None:
    pair.auto_grant = False
    pair.whole(key(), 4)
    pair.run(1)


def computing(pair: HingePair) -> None:
    pair.expect(key(), 12)
    pair.open(key(), 12)
    pair.compute(key(), 5)
    pair.run(7)


@pytest.mark.parametrize("state", [idle, waiting_for_blocks, computing])
def test_d_decides_in_time_that_a_stopped_p_is_gone(state: Callable[[HingePair], None]) -> None:
    pair = HingePair()
    state(pair)
    was_open = pair.receiver.num_open
    stop(pair, "p")
    pair.run(DECIDED_S)
    assert not pair.receiver._pairs
    assert pair.receiver.counters["kv_pairs_lost_total"] == 1
    assert pair.receiver.num_open == 0
    if was_open:
        assert isinstance(pair.failure(key()), PeerLost)


@pytest.mark.parametrize("state", [idle, waiting_for_blocks, computing])
def test_p_decides_in_time_that_a_stopped_d_is_gone(state: Callable[[HingePair], None]) -> None:
    pair = HingePair()
    state(pair)
    was_open = pair.sender.num_open
    stop(pair, "d")
    pair.run(DECIDED_S)
    assert not pair.sender._pairs
    assert pair.sender.num_open == pair.sender.ledger.num_busy == 0
    if was_open:
        assert isinstance(pair.released[key()].error, PeerLost)


@pytest.mark.parametrize("deaf", ["p", "d"])
def test_one_way_that_is_cut_takes_the_pair_down_at_both_ends(deaf: str) -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 8)
    pair.run(2)
    machine = pair.sender if deaf == "p" else pair.receiver
    machine.on_message = lambda link, message, now: None  # type: ignore[method-assign]
    pair.run(2 * DECIDED_S)
    assert isinstance(pair.failure(key()), PeerLost)
    assert isinstance(pair.released[key()].error, PeerLost)
    assert not pair.sender._pairs
    assert not pair.receiver._pairs
    pair.check_quiet()


def test_a_pair_that_has_nothing_to_do_stays_up() -> None:
    pair = HingePair(weather=Weather(delay_s=0.3))
    pair.whole(key(1), 4)
    pair.run(300)
    assert all(isinstance(message, Heartbeat) for _, message in pair.sent[-4:])
    pair.whole(key(2), 4)
    pair.run(2)
    assert pair.committed(key(2))
    assert len(pair.dialed) == 1


def test_the_first_transfer_after_a_loss_forms_a_new_pair() -> None:
    pair = HingePair()
    pair.whole(key(1), 4)
    pair.run(1)
    pair._up.clear()  # nothing arrives any more
    pair.run(2)
    pair.whole(key(2), 4)
    pair.run(1)
    assert pair.committed(key(2))
    assert len(pair.dialed) == 2
    pair.check_quiet()


def test_what_a_stopped_p_says_when_it_continues_is_fenced() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(), 4)
    pair.run(1)
    old = pair._pair_epoch
    pair._up.clear()
    pair.run(2)
    pair.expect(key(2), 4)
    pair.run(1)
    before = pair.receiver.counters["kv_fenced_messages_total"]
    pair.inject("d", PrefillFinished(key(2), 1, 4, 9, final=True), pair_epoch=old)
    assert pair.receiver.counters["kv_fenced_messages_total"] == before + 1
    assert key(2) not in pair.outcomes


# ---- the pulse itself -------------------------------------------------------------------------


def beat(pulse: Pulse, start: float, end: float) -> list[float]:
    """Tick as a driver does; the times at which somebody counted as lost."""
    times = [start + TICK_S * count for count in range(round((end - start) / TICK_S) + 1)]
    return [at for at in times if pulse.tick(at)]


def test_silence_is_noticed_within_a_tick_of_its_limit() -> None:
    pulse = Pulse(TransferSettings(silence_s=1.2))
    pulse.begin(LINK, 100.0)
    pulse.heard(LINK, 100.5)
    lost = beat(pulse, 100.0, 103.0)
    assert 101.7 <= lost[0] <= 101.8 + 1e-6


def test_a_watcher_that_did_not_run_takes_nobody_for_lost() -> None:
    pulse = Pulse(TransferSettings(silence_s=1.2))
    pulse.begin(LINK, 100.0)
    assert not beat(pulse, 100.0, 100.5)
    assert not pulse.tick(160.0)  # stopped for a minute
    lost = beat(pulse, 160.1, 165.0)
    assert 160.6 <= lost[0] <= 160.9, "what it had waited before counts"


def test_words_that_wait_for_their_turn_count_when_they_came() -> None:
    pulse = Pulse(TransferSettings(silence_s=1.2))
    pulse.begin(LINK, 100.0)
    pulse.heard(LINK, 102.0)
    pulse.heard(LINK, 101.0)  # an older one is worked off later
    assert not beat(pulse, 102.0, 103.0)
    pulse.end(LINK)
    pulse.heard(LINK, 103.0)
    assert pulse.is_idle


@pytest.mark.parametrize("settings", [{"heartbeat_s": 1000}, {"stall_s": 0.9}, {"lease_s": 0.6}, {"silence_s": 0.3}])
def test_two_answers_fit_into_every_limit(settings: dict[str, float]) -> None:
    chosen = TransferSettings.model_validate(settings)
    pulse = Pulse(chosen)
    assert 2 * pulse.beat_s < min(chosen.silence_s, chosen.stall_s, chosen.lease_s)


# ---- what changes nothing ---------------------------------------------------------------------


def test_a_fenced_word_of_a_newer_attempt_ends_no_older_one() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(key(1, 0), 4)
    pair.run(1)
    for message in (Expect(key(1, 1), 0), ChunkAck(key(1, 1), 0, 0, 1, ChunkStatus.OK)):
        pair.inject("p", message, pair_epoch=99)
    pair.inject("p", PrefillFinished(key(1, 1), 0, 4, 1, final=True))  # not a word of a decode engine
    pair.inject("d", Abort(key(1, 1), "x", ""))  # nobody here expects that attempt
    pair.grant(key(1, 0))
    pair.run(1)
    assert pair.committed(key(1, 0))
    assert pair.released[key(1, 0)].error is None


# ---- blame ------------------------------------------------------------------------------------


def test_a_transport_that_alters_bytes_is_left_and_the_next_pair_is_formed_without_it() -> None:
    pair = HingePair(weather=Weather(corrupt=1.0))
    pair.whole(key(1), 4)  # two fetches of its one chunk
    pair.run(1)
    assert not pair.receiver.counters["kv_transports_blamed_total"]
    pair.whole(key(2), 4)
    pair.run(1)
    assert isinstance(pair.failure(key(2)), PeerLost)
    assert pair.receiver.counters["kv_transports_blamed_total"] == 1
    pair.weather.corrupt = 0.0
    pair.whole(key(3), 4)
    pair.run(1)
    assert pair.committed(key(3))
    assert [dial.without for dial in pair.dialed] == [(), ("test",)]
    pair.check_quiet()


def test_where_there_is_no_other_transport_a_blamed_one_is_not_left_again() -> None:
    pair = HingePair(weather=Weather(corrupt=1.0))
    for number in range(10):
        pair.whole(key(number), 4)
        pair.run(1)
    assert len(pair.dialed) == 2
    assert not any(pair.committed(key(number)) for number in range(10))
    pair.check_quiet()


def test_blame_needs_three_in_a_minute_and_ends_with_the_life_of_the_engine() -> None:
    blame = Blame()
    assert not any(blame.altered(LINK, "shm", at) for at in (0.0, 40.0, 80.0, 120.0))
    assert blame.altered(LINK, "shm", 121.0)
    assert blame.of(EngineRef(LINK.engine_id, LINK.epoch, "")) == ("shm",)
    assert blame.of(EngineRef(LINK.engine_id, LINK.epoch + 1, "")) == ()
    assert blame.of(EngineRef(EngineId("p1"), LINK.epoch, "")) == ()


def test_a_lost_expect_is_said_again_when_the_next_heartbeat_is_answered_without_it() -> None:
    pair = HingePair()
    pair.run(1)
    say = pair.receiver._send
    lost: list[Message] = []

    def lossy(link: Link, message: Message) -> None:
        if isinstance(message, Expect) and not lost:
            lost.append(message)
        else:
            say(link, message)

    pair.receiver._send = lossy  # type: ignore[method-assign]
    pair.whole(key(), 10)
    pair.run(pair.settings.heartbeat_s + 1)
    assert lost
    assert pair.committed(key())
    pair.check_quiet()
