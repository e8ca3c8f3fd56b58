"""A step that does not come back is noticed; a process that got no time, or many short steps, are not."""

from __future__ import annotations

import threading

from diptych.cluster.engine.stall import CHECKS, StallWatch


class Loop:
    def __init__(self) -> None:
        self.phase = 0
        self.stalls: list[float] = []
        self.watch = StallWatch(lambda: self.phase, limit_s=8.0, on_stall=self.stalls.append)


def test_one_turn_longer_than_the_limit_is_a_stall() -> None:
    loop = Loop()
    loop.phase = 1
    assert [loop.watch.is_stalled(1.0) for _ in range(10)] == [False] * 9 + [True]


def test_many_turns_are_none_however_long_they_take_together() -> None:
    loop = Loop()
    for phase in range(1, 401, 2):
        loop.phase = phase
        assert not any(loop.watch.is_stalled(1.0) for _ in range(5))


def test_waiting_for_work_is_none() -> None:
    loop = Loop()
    loop.phase = 2
    assert not any(loop.watch.is_stalled(1.0) for _ in range(100))


def test_time_that_the_process_did_not_get_itself_does_not_count() -> None:
    loop = Loop()
    loop.phase = 1
    loop.watch.is_stalled(1.0)
    assert not loop.watch.is_stalled(3600.0), "it was stopped for an hour, in the middle of a step"


def test_the_thread_tells_once_and_ends() -> None:
    told = threading.Event()
    seconds: list[float] = []

    def tell(stalled_s: float) -> None:
        seconds.append(stalled_s)
        told.set()

    watch = StallWatch(lambda: 1, limit_s=0.01 * CHECKS, on_stall=tell)
    watch.start()
    assert told.wait(20)
    watch._thread.join(20)
    assert not watch._thread.is_alive()
    assert len(seconds) == 1
    assert seconds[0] > 0.01 * CHECKS


def test_a_watch_that_is_stopped_ends() -> None:
    watch = StallWatch(lambda: 1, limit_s=3600.0, on_stall=lambda _: None)
    watch.start()
    watch.stop()
    watch._thread.join(20)
    assert not watch._thread.is_alive()
