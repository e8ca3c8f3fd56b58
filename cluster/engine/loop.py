"""The step thread of an engine: inbox -> worker.submit/cancel/on_transfer -> worker.step, role by role.

It owns workers and block pool; everybody else reads the frozen readings that it leaves behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping

from diptych.kvtransfer.prefix import NameJournal
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Clock, Worker, WorkerLoad
from diptych.protos.status import EngineStatus
from diptych.protos.types import DecodeOrder, PoolCounts, PrefillOrder, Role

from .inbox import CancelRequest, Inbox, InboxItem, TransferNews
from .outbox import Outbox

READING_PERIOD_S = 0.1  # a busy loop leaves a new reading this often, an idle one at once
IDLE_WAIT_S = 1.0  # the longest sleep; a wake-up costs microseconds
NAMES_WAIT_S = 0.05  # the longest sleep while block names wait to be told
MIN_WAIT_S = 0.001  # a worker whose wake time is past but who has nothing to run must not make the loop spin


class StepLoop:
    """Runs in one thread from `run` until `stop`. `reading()` may be called from any thread."""

    def __init__(
        self,
        *,
        workers: Mapping[Role, Worker],
        inbox: Inbox,
        counts: Callable[[], PoolCounts],
        clock: Clock,
        pipeline: StepPipeline | None = None,
        names: tuple[NameJournal, Outbox] | None = None,  # the pool's journal, and where its changes go
    ) -> None:
        """`pipeline`: the workers', empty when `run` returns; its runner is told when the engine has no requests."""
        self._workers = dict(workers)
        self._inbox = inbox
        self._counts = counts
        self._clock = clock
        self._pipeline = pipeline
        self._names = names
        self._stopping = threading.Event()
        self._calls: deque[Callable[[], None]] = deque()
        self.phase = 0  # odd within a turn, see StallWatch
        self._steps = 0
        self._busy = 0.0
        self._read_at = float("-inf")
        self._reading = EngineStatus()
        self._read()

    def run(self) -> None:
        """Until `stop`. What a worker raises is of no one request (protos/barrier.py): it ends the loop and with it the
        engine.
        """
        idle = False
        while not self._stopping.is_set():
            idle = not self.turn(self.sleep_s() if idle else 0.0)
        if self._pipeline is not None:
            self._pipeline.settle(leave=0)

    def turn(self, wait_s: float) -> bool:
        """Take what arrives within `wait_s` seconds, then let each role step once. False: nothing happened."""
        items = self._inbox.take_all(wait_s)
        self.phase += 1
        while self._calls:
            self._calls.popleft()()
        for item in items:
            self._dispatch(item)
        began = self._clock()
        stepped = 0
        for worker in self._workers.values():
            stepped += bool(worker.step())
        now = self._clock()
        if stepped:
            self._steps += stepped
            self._busy += now - began
        # A worker whose step is under way steps again: nobody sleeps while the device computes.
        happened = bool(items) or stepped > 0 or (self._is_empty() and self._did_idle_work())
        if not stepped or now - self._read_at >= READING_PERIOD_S:
            self._read()
        if self._names is not None:
            self._tell_names(*self._names)
        self.phase += 1
        return happened

    def _is_empty(self) -> bool:
        return all(worker.load() == WorkerLoad(0, 0) for worker in self._workers.values())

    def _did_idle_work(self) -> bool:
        return self._pipeline is not None and self._pipeline.runner.idle()

    def call(self, action: Callable[[], None]) -> None:
        """Have the step thread run `action` between two turns; from any thread."""
        self._calls.append(action)
        self._inbox.wake()

    def stop(self) -> None:
        """The loop ends after the turn it is in."""
        self._stopping.set()
        self._inbox.close()

    def reading(self) -> EngineStatus:
        """The last reading; the counters are the loop's own and those of every worker."""
        return self._reading

    def _dispatch(self, item: InboxItem) -> None:
        match item:
            case PrefillOrder():
                self._workers[Role.PREFILL].submit(item)
            case DecodeOrder():
                self._workers[Role.DECODE].submit(item)
            case CancelRequest(role, key):
                self._workers[role].cancel(key)
            case TransferNews(role, event):
                self._workers[role].on_transfer(event)

    def sleep_s(self) -> float:
        """How long an idle loop may sleep."""
        longest = IDLE_WAIT_S if self._names is None or self._names[0].is_empty else NAMES_WAIT_S
        wakes = [wake for worker in self._workers.values() if (wake := worker.next_wake()) is not None]
        if not wakes:
            return longest
        return min(max(min(wakes) - self._clock(), MIN_WAIT_S), longest)

    def _tell_names(self, journal: NameJournal, outbox: Outbox) -> None:
        if not journal.is_empty and outbox.takes_names:
            change = journal.drain()
            assert change is not None
            outbox.put_names(change)

    def _read(self) -> None:
        self._read_at = self._clock()
        loads = [worker.load() for worker in self._workers.values()]
        total = WorkerLoad(sum(load.running for load in loads), sum(load.waiting for load in loads))
        counters = {"engine_steps_total": float(self._steps), "engine_busy_seconds_total": self._busy}
        for worker in self._workers.values():
            counters |= worker.counters()
        self._reading = EngineStatus(
            running=total.running,
            waiting=total.waiting,
            blocks=self._counts(),
            steps=self._steps,
            counters=counters,
        )
