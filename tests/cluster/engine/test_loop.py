from __future__ import annotations

import threading

from diptych.cluster.engine.inbox import CancelRequest, Inbox, TransferNews
from diptych.cluster.engine.loop import IDLE_WAIT_S, MIN_WAIT_S, NAMES_WAIT_S, StepLoop
from diptych.cluster.engine.outbox import Outbox
from diptych.kvtransfer.prefix import NameChange, PrefixIndex, short_name
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Closed, ReceiveEvent, SendEvent, WorkerLoad
from diptych.protos.step import StepPlan, StepRow
from diptych.protos.testing import EchoRunner, FakeClock
from diptych.protos.types import (
    GENERATING,
    DecodeOrder,
    EngineId,
    EngineRef,
    GenerateRequest,
    PoolCounts,
    PrefillOrder,
    Role,
    SamplingParams,
    TransferKey,
)

KEY = TransferKey(b"k" * 16)
PEER = EngineRef(EngineId("d"), 1, "unix:/d")


def order(role: Role, key: TransferKey = KEY) -> PrefillOrder | DecodeOrder:
    request = GenerateRequest(key=key, prompt=(1, 2), sampling=SamplingParams(max_tokens=1))
    return (
        PrefillOrder(request=request, decode=PEER)
        if role is Role.PREFILL
        else DecodeOrder(request=request, prefill=None)
    )


class ScriptedWorker:
    """Has `work` steps to do and logs what it is told."""

    def __init__(self, role: Role, log: list[str]) -> None:
        self.role = role
        self.work = 0
        self.waiting = 1
        self.wake: float | None = None
        self._log = log

    def submit(self, order: PrefillOrder | DecodeOrder) -> None:
        self._log.append(f"{self.role} submit")

    def cancel(self, key: TransferKey) -> None:
        self._log.append(f"{self.role} cancel")

    def on_transfer(self, event: SendEvent | ReceiveEvent) -> None:
        self._log.append(f"{self.role} {type(event).__name__}")

    def step(self) -> bool:
        if self.work:
            self.work -= 1
            self._log.append(f"{self.role} step")
            return True
        return False

    def next_wake(self) -> float | None:
        return self.wake

    def load(self) -> WorkerLoad:
        return WorkerLoad(running=self.work, waiting=self.waiting)

    def counters(self) -> dict[str, float]:
        return {f"{self.role}_steps_left_total": float(self.work)}


class PiecewiseRunner(EchoRunner):
    """Has `pieces` of work to do while nobody asks for anything."""

    pieces = 0

    def max_runs(self, rows: int) -> int:
        return rows

    def idle(self) -> bool:
        self.pieces -= 1
        return self.pieces >= 0


class Bench:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock = FakeClock()
        self.inbox = Inbox(max_orders=3)
        self.workers = {role: ScriptedWorker(role, self.log) for role in GENERATING}
        counts = PoolCounts(total=4, free=4, cached=0, used=0)
        self.runner = PiecewiseRunner(num_blocks=2, block_tokens=4)
        self.pipeline = StepPipeline(self.runner, self.clock)
        self.loop = StepLoop(
            workers=self.workers, inbox=self.inbox, counts=lambda: counts, clock=self.clock, pipeline=self.pipeline
        )


def test_items_reach_the_worker_of_their_role_in_order() -> None:
    bench = Bench()
    bench.inbox.try_put(order(Role.DECODE))
    bench.inbox.try_put(order(Role.PREFILL))
    bench.inbox.put(CancelRequest(Role.DECODE, KEY))
    bench.inbox.put(TransferNews(Role.DECODE, Closed(KEY)))
    assert bench.loop.turn(0.0)
    assert bench.log == ["decode submit", "prefill submit", "decode cancel", "decode Closed"]


def test_the_roles_take_turns_step_by_step() -> None:
    """A long prefill queue must not stop decoding in an engine of both roles."""
    bench = Bench()
    bench.workers[Role.PREFILL].work = 3
    bench.workers[Role.DECODE].work = 2
    while bench.loop.turn(0.0):
        pass
    assert bench.log == ["prefill step", "decode step", "prefill step", "decode step", "prefill step"]
    assert bench.loop.reading().steps == 5


def test_the_inbox_bounds_orders_but_never_cancels() -> None:
    bench = Bench()
    assert [bench.inbox.try_put(order(Role.DECODE)) for _ in range(4)] == [True, True, True, False]
    bench.inbox.put(CancelRequest(Role.DECODE, KEY))
    assert len(bench.inbox.take_all(0.0)) == 4
    assert bench.inbox.try_put(order(Role.DECODE))


def test_an_idle_loop_sleeps_until_the_earliest_wake_and_never_spins() -> None:
    bench = Bench()
    assert bench.loop.sleep_s() == IDLE_WAIT_S
    bench.workers[Role.DECODE].wake = bench.clock.now + 0.25
    bench.workers[Role.PREFILL].wake = bench.clock.now + 0.5
    assert bench.loop.sleep_s() == 0.25
    bench.clock.advance(10)
    assert bench.loop.sleep_s() == MIN_WAIT_S


def test_an_engine_without_requests_does_what_is_left_to_do_piece_by_piece_before_it_sleeps() -> None:
    bench = Bench()
    bench.runner.pieces = 2
    assert not bench.loop.turn(0.0)
    assert bench.runner.pieces == 2, "a request waits here, if only for another engine"
    for worker in bench.workers.values():
        worker.waiting = 0
    bench.workers[Role.DECODE].work = 1
    assert [bench.loop.turn(0.0) for _ in range(4)] == [True, True, True, False]
    assert bench.loop.reading().steps == 1


def test_nothing_is_under_way_when_the_loop_has_ended() -> None:
    bench, told = Bench(), list[object]()
    row = StepRow(slot=0, num_tokens=2, tokens=(5, 6), start=0, blocks=(0,), sample=None)
    bench.pipeline.launch(StepPlan(1, (row,)), told.append)
    bench.loop.stop()
    bench.loop.run()
    assert (bench.pipeline.num_outstanding, len(told)) == (0, 1)


def test_a_reading_is_left_when_the_loop_goes_idle() -> None:
    bench = Bench()
    bench.workers[Role.DECODE].work = 1
    bench.loop.turn(0.0)
    bench.loop.turn(0.0)
    reading = bench.loop.reading()
    assert (reading.running, reading.waiting, reading.blocks.free) == (0, 2, 4)


def test_a_write_wakes_the_sleeping_loop_and_stop_ends_it() -> None:
    """The loop sleeps for up to IDLE_WAIT_S at a time; with that set to an hour only wake-ups can end this test."""
    bench = Bench()
    got = threading.Event()
    worker = bench.workers[Role.DECODE]
    worker.submit = lambda order: got.set()  # type: ignore[method-assign]
    bench.loop.sleep_s = lambda: 3600.0  # type: ignore[method-assign]
    thread = threading.Thread(target=bench.loop.run)
    thread.start()
    try:
        assert bench.inbox.try_put(order(Role.DECODE))
        assert got.wait(20)
    finally:
        bench.loop.stop()
        thread.join(20)
    assert not thread.is_alive()


def test_a_reading_holds_the_counters_of_the_loop_and_of_every_worker() -> None:
    bench = Bench()
    bench.workers[Role.DECODE].work = 2
    bench.loop.turn(0.0)
    bench.clock.now += 1
    bench.loop.turn(0.0)
    assert bench.loop.reading().counters == {
        "engine_steps_total": 2.0,
        "engine_busy_seconds_total": 0.0,
        "prefill_steps_left_total": 0.0,
        "decode_steps_left_total": 0.0,
    }


def test_block_names_wait_in_the_journal_until_the_last_change_was_taken() -> None:
    bench, index, outbox = Bench(), PrefixIndex(), Outbox(4)
    journal = index.watch(max_names=9)
    counts = PoolCounts(total=4, free=4, cached=0, used=0)
    loop = StepLoop(
        workers=bench.workers, inbox=bench.inbox, counts=lambda: counts, clock=bench.clock, names=(journal, outbox)
    )
    names = [bytes([n]) * 32 for n in range(3)]
    index.bind(names[0], 0)
    loop.turn(0.0)
    assert loop.sleep_s() == IDLE_WAIT_S
    index.bind(names[1], 1)
    loop.turn(0.0)
    index.bind(names[2], 2)
    index.unbind(0)
    loop.turn(0.0)
    assert loop.sleep_s() == NAMES_WAIT_S, "an idle loop must not keep names to itself"
    assert outbox.take_names() == NameChange((short_name(names[0]),), reset=True)
    loop.turn(0.0)
    later = outbox.take_names()
    assert later == NameChange((short_name(names[1]), short_name(names[2])), (short_name(names[0]),))
    loop.turn(0.0)
    assert outbox.take_names() is None
