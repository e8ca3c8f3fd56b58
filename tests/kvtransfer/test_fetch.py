"""Threads for fetches: a peer that keeps its callers waiting does not keep others from theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from diptych.kvtransfer.fetch import FetchThreads, read_chunk
from diptych.kvtransfer.messages import ChunkReady
from diptych.kvtransfer.receiver import FetchResult
from diptych.kvtransfer.ring import SlotRef, TornRead, checksum
from diptych.protos.errors import PeerLost
from diptych.protos.types import EngineId, TransferKey

HOLE, GOOD = EngineId("p0"), EngineId("p1")
WAIT_S = 20


@pytest.fixture
def threads() -> Iterator[FetchThreads]:
    made = FetchThreads(num_threads=4, per_peer=2)
    yield made
    made.stop()


def test_a_black_hole_holds_two_threads_and_the_others_go_on(threads: FetchThreads) -> None:
    hole, entered, done = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def fall() -> None:
        entered.release()
        assert hole.wait(WAIT_S)

    for _ in range(6):
        threads.post(HOLE, fall)
    for _ in range(2):
        assert entered.acquire(timeout=WAIT_S)
    for _ in range(20):
        threads.post(GOOD, done.release)
    for _ in range(20):
        assert done.acquire(timeout=WAIT_S)
    assert not entered.acquire(blocking=False), "a third one fell into the hole"
    hole.set()
    for _ in range(4):
        assert entered.acquire(timeout=WAIT_S)


def test_what_is_queued_is_done_before_the_end_and_fetches_of_one_peer_begin_in_order() -> None:
    threads = FetchThreads(num_threads=4, per_peer=1)
    begun: list[int] = []
    for number in range(50):
        threads.post(HOLE, lambda number=number: begun.append(number))  # type: ignore[misc]
    threads.stop()
    assert begun == list(range(50))


def test_an_end_without_a_beginning_waits_for_nothing() -> None:
    FetchThreads(num_threads=4, per_peer=2).stop()


class Reader:
    inline = True

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer

    def read(self, ref: SlotRef, out: memoryview) -> None:
        if isinstance(self.answer, Exception):
            raise self.answer
        out[:] = self.answer

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (b"right", FetchResult.OK),
        (b"wrong", FetchResult.CHECKSUM),
        (TornRead("reused"), FetchResult.TORN),
        (PeerLost("gone"), FetchResult.ERROR),
    ],
)
def test_a_chunk_is_right_altered_torn_or_not_to_be_had(answer: bytes | Exception, result: FetchResult) -> None:
    ready = ChunkReady(TransferKey(bytes(16)), 0, 0, 1, 0, 1, 5, checksum(memoryview(b"right")))
    buffer = bytearray(b"and what was there before")
    assert read_chunk(Reader(answer), ready, buffer) is result
    if result is FetchResult.OK:
        assert buffer[:5] == b"right"
