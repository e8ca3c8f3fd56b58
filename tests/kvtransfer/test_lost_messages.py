"""One message of a transfer is lost and the stream stands: the transfer goes on, or ends in time, and nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from diptych.kvtransfer.messages import AbortAck, ChunkAck, ChunkReady, Expect, FinalAck, Message, PrefillFinished
from diptych.kvtransfer.testing import HingePair
from diptych.protos.errors import Cancelled, TransferTimeout
from diptych.protos.types import TransferKey

KEY = TransferKey(b"k" * 16)


@dataclass
class Lossy(HingePair):
    """Loses the message number `nth` of one kind."""

    kind: type = Expect
    nth: int = 0

    def _transmit(self, by: str, pair_epoch: int, message: Message) -> None:
        if isinstance(message, self.kind):
            self.nth -= 1
            if self.nth == -1:
                return
        super()._transmit(by, pair_epoch, message)

    @property
    def lost_one(self) -> bool:
        return self.nth < 0


@pytest.mark.parametrize("nth", [0, 1, 3])
@pytest.mark.parametrize("kind", [ChunkReady, ChunkAck, PrefillFinished])
def test_what_is_not_acknowledged_is_said_again_with_the_heartbeats(kind: type, nth: int) -> None:
    pair = Lossy(kind=kind, nth=0 if kind is PrefillFinished else nth)
    pair.whole(KEY, 30)  # eight chunks through four slots
    pair.run(2.5)
    assert pair.lost_one
    assert pair.committed(KEY), f"{kind.__name__} number {nth} was lost, and the transfer waits"
    assert pair.released[KEY].error is None
    pair.check_quiet()


def test_a_repetition_is_no_progress() -> None:
    pair = HingePair(auto_grant=False)
    pair.whole(KEY, 8)
    pair.run(0.1)
    pair.grant(KEY)
    before = [t.progress_at for t in pair.receiver._open.values()]
    for by, message in list(pair.sent):
        if by == "p" and isinstance(message, ChunkReady | PrefillFinished):
            pair.now += 1.0
            pair.inject("d", message)
    assert [t.progress_at for t in pair.receiver._open.values()] == before
    pair.run(5.0)
    assert pair.committed(KEY)
    pair.check_quiet()


def test_a_lost_final_ack_costs_the_prefill_engine_a_lease_and_the_client_nothing() -> None:
    pair = Lossy(kind=FinalAck)
    pair.whole(KEY, 10)
    pair.run(1.0)
    assert pair.committed(KEY)
    pair.run(pair.settings.lease_s + 1)
    assert isinstance(pair.released[KEY].error, TransferTimeout)
    pair.check_quiet()


def test_a_lost_expect_is_said_again_when_a_heartbeat_is_answered_without_it() -> None:
    pair = Lossy(kind=Expect)
    pair.whole(KEY, 10)
    pair.run(2.5)
    assert pair.lost_one
    assert pair.committed(KEY)
    assert pair.released[KEY].error is None
    pair.check_quiet()


def test_a_lost_abort_ack_costs_a_quarantine() -> None:
    pair = Lossy(kind=AbortAck, auto_grant=False)
    pair.whole(KEY, 10)
    pair.run(0.1)
    pair.abort_p(KEY, Cancelled("nobody wants it"))
    pair.run(pair.settings.abort_ack_s + 0.5)
    assert pair.sender.counters["kv_quarantine_timeouts_total"] == 1
    pair.check_quiet()
