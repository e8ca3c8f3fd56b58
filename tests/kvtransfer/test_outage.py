"""An unreachable prefill engine costs its first requests a wait, the later ones none, and it comes back alone."""

from __future__ import annotations

import pytest

from diptych.kvtransfer.outage import Outages
from diptych.kvtransfer.testing import HingePair
from diptych.protos.errors import PeerLost, TransferError
from diptych.protos.types import EngineId, EngineRef, TransferKey

HEALED_S = 15.0  # after which a pair must be as ever
DEAD = EngineRef(EngineId("p0"), 5, "unix:/p0")
ERROR = PeerLost("nobody answers")


def key(number: int) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"))


def cut(pair: HingePair, *, dial_s: float = 1.2) -> None:
    """The link is gone: what is dialed fails after a while."""
    pair.reachable = False
    pair.weather.delay_s = dial_s
    pair.rng.uniform = lambda low, high: high  # type: ignore[method-assign]


def heal(pair: HingePair) -> None:
    pair.reachable = True
    pair.weather.delay_s = 0.0


def test_after_the_first_failure_a_transfer_is_refused_at_once_and_retryably() -> None:
    pair = HingePair()
    cut(pair)
    pair.expect(key(1), 10)
    pair.run(3)
    assert pair.failure(key(1)) is not None
    for number in range(2, 20):
        pair.expect(key(number), 10)
        error = pair.failure(key(number))
        assert isinstance(error, TransferError), "before any time has passed"
        assert error.retryable
        pair.run(0.5)
    assert pair.receiver.num_unreachable == 1
    assert pair.receiver.counters["kv_unreachable_transfers_total"] == 18
    assert len(pair.dialed) < 8, "the pauses grow"


@pytest.mark.parametrize("down_s", [1.0, 8.0, 30.0, 300.0])
def test_a_link_that_heals_is_noticed_in_time_whether_it_was_down_for_long_or_not(down_s: float) -> None:
    pair = HingePair()
    cut(pair)
    number = 1
    for _ in range(int(down_s)):
        pair.expect(key(number), 10)
        pair.run(1)
        number += 1
    heal(pair)
    pair.run(HEALED_S / 2)
    dialed = len(pair.dialed)
    pair.whole(key(number), 10)
    pair.run(0.5)
    assert pair.committed(key(number))
    assert len(pair.dialed) == dialed, "the pair stood before it was asked for"
    assert pair.receiver.num_unreachable == 0
    pair.run(HEALED_S)
    assert len(pair.dialed) == dialed


def test_nobody_is_dialed_for_ever() -> None:
    """The engine may be gone for good: the machine is not told."""
    pair = HingePair()
    cut(pair)
    pair.expect(key(1), 10)
    pair.run(60)
    assert pair.receiver.num_unreachable == 0
    assert pair.receiver.is_idle
    before = len(pair.dialed)
    pair.run(60)
    assert len(pair.dialed) == before
    heal(pair)
    pair.whole(key(2), 10)
    pair.run(1)
    assert pair.committed(key(2))


def test_a_new_life_of_the_engine_has_nothing_to_do_with_the_old_one() -> None:
    outages = Outages()
    outages.failed(DEAD, ERROR, 100.0)
    reborn = EngineRef(DEAD.engine_id, DEAD.epoch + 1, DEAD.target)
    assert outages.why(reborn, 100.0) is None
    assert outages.why(DEAD, 100.0) is ERROR
    outages.reached(reborn.engine_id, reborn.epoch)
    assert not len(outages)


def test_the_news_of_an_older_life_does_not_end_the_outage_of_a_newer_one() -> None:
    outages = Outages()
    outages.failed(DEAD, ERROR, 100.0)
    outages.reached(DEAD.engine_id, DEAD.epoch - 1)
    outages.reached(EngineId("p1"), 99)
    assert outages.why(DEAD, 100.0) is ERROR


def test_an_engine_is_dialed_once_at_a_time() -> None:
    outages = Outages()
    outages.failed(DEAD, ERROR, 100.0)
    assert outages.due(100.1) == []
    assert outages.due(100.3) == [DEAD]
    assert outages.due(110.0) == [], "its dial is under way"
    outages.failed(DEAD, ERROR, 111.0)
    assert outages.due(111.3) == []
    assert outages.due(111.6) == [DEAD]
