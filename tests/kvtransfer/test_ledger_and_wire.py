from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from diptych.kvtransfer.ledger import SlotLedger
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
from diptych.kvtransfer.wire import from_pb, layout_from_pb, to_pb
from diptych.protos import kv_pb2 as pb
from diptych.protos.errors import TransferError
from diptych.protos.types import EngineId, TransferKey

KEY = TransferKey(bytes(range(16)), 3)
A, B, C = (EngineId(name) for name in "abc")


@pytest.mark.parametrize(
    "message",
    [
        Expect(KEY, 5),
        ChunkReady(KEY, 1, 2, 3, 4, 5, 6, 2**64 - 1),
        ChunkAck(KEY, 1, 2, 3, ChunkStatus.TORN),
        PrefillFinished(KEY, 1, 2, 3, final=True),
        FinalAck(KEY),
        Abort(KEY, "code", "message"),
        AbortAck(KEY),
        Heartbeat((KEY, TransferKey(bytes(16), 0))),
    ],
)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert from_pb(pb.KvMsg.FromString(to_pb(message).SerializeToString())) == message


def test_nonsense_off_the_wire_is_a_transfer_error() -> None:
    for msg in (
        pb.KvMsg(),
        pb.KvMsg(hello=pb.Hello()),
        pb.KvMsg(expect=pb.Expect(key=pb.TransferKey(transfer_id=b"short"))),
    ):
        with pytest.raises(TransferError):
            from_pb(msg)
    with pytest.raises(TransferError, match="geometry"):
        layout_from_pb(pb.Geometry(dtype="int3"))


def taker(ledger: SlotLedger) -> Callable[[EngineId], int | None]:
    return lambda pair: ledger.try_take(pair, KEY)


def test_a_pair_is_sure_of_its_slots_whatever_the_others_hold() -> None:
    ledger = SlotLedger(8, 2)
    take = taker(ledger)
    for pair in (A, B, C):
        ledger.add_pair(pair)
    assert [take(A) is not None for _ in range(6)] == [True] * 4 + [False] * 2
    assert [take(B) is not None for _ in range(3)] == [True, True, False]
    assert [take(C) is not None for _ in range(3)] == [True, True, False]
    ledger.check_integrity()
    ledger.remove_pair(C)  # its slots are still in use until they are retired
    assert take(A) is None


def test_spare_slots_of_a_pair_are_those_that_it_could_still_take() -> None:
    ledger = SlotLedger(4, 1)
    ledger.add_pair(A)
    ledger.add_pair(B)
    assert [ledger.try_take(A, KEY, spare=1) is not None for _ in range(3)] == [True, True, False]
    assert ledger.try_take(A, KEY) is not None
    assert ledger.try_take(A, KEY) is None
    assert ledger.try_take(B, KEY, spare=1) is None
    assert ledger.try_take(B, KEY) is not None


def test_more_pairs_than_slots_share_what_there_is() -> None:
    ledger = SlotLedger(2, 2)
    pairs = [EngineId(str(number)) for number in range(5)]
    for pair in pairs:
        ledger.add_pair(pair)
    assert sum(ledger.try_take(pair, KEY) is not None for pair in pairs) == 2


def test_a_slot_changes_its_generation_at_every_reuse() -> None:
    ledger = SlotLedger(1, 1)
    ledger.add_pair(A)
    seen = []
    for _ in range(3):
        slot = ledger.try_take(A, KEY)
        assert slot is not None
        seen.append(ledger.slots[slot].generation)
        ledger.retire(slot)
    assert len(set(seen)) == 3
    ledger.slots[0].generation = 0xFFFF_FFFF
    assert ledger.try_take(A, KEY) == 0
    assert ledger.retire(0) == 1  # u32, and 0 is nobody's


def test_random_use_keeps_the_sums() -> None:
    rng = random.Random(5)
    ledger = SlotLedger(6, 2)
    held: list[int] = []
    up: set[EngineId] = set()
    for _ in range(2000):
        pair = rng.choice([A, B, C])
        match rng.randrange(5):
            case 0 if pair not in up:
                ledger.add_pair(pair)
                up.add(pair)
            case 1 if pair in up and rng.random() < 0.2:
                ledger.remove_pair(pair)
                up.discard(pair)
            case 2 | 3 if pair in up:
                slot = ledger.try_take(pair, KEY)
                if slot is not None:
                    held.append(slot)
                    if rng.random() < 0.7:
                        ledger.staged(slot)
                        if rng.random() < 0.3:
                            ledger.quarantine(slot)
            case 4 if held:
                ledger.retire(held.pop(rng.randrange(len(held))))
        ledger.check_integrity()
        assert ledger.num_busy == len(held)
