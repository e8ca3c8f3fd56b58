"""What is summed over steps, with a clock that the test turns."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from diptych.cluster.engine import step_times
from diptych.cluster.engine.step_times import StepTotals, TimedRunner
from diptych.protos.ports import StepCost
from diptych.protos.step import StepPlan, StepResult, StepRow


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Computes:
    """A runner that takes time where it is told to."""

    max_slots, max_step_tokens, vocab_size = 8, 64, 100
    cost: StepCost | None = None

    def __init__(self, clock: Clock, *, launch_s: float, collect_s: float, depth: int) -> None:
        self._clock, self._launch_s, self._collect_s = clock, launch_s, collect_s
        self.depth = depth
        self._plans: deque[StepPlan] = deque()
        self.fails = False

    def launch(self, plan: StepPlan) -> None:
        self._clock.now += self._launch_s
        self._plans.append(plan)

    def collect(self) -> StepResult:
        self._clock.now += self._collect_s
        plan = self._plans.popleft()
        if self.fails:
            raise RuntimeError("the step failed")
        return StepResult(plan.step_id, (None,) * len(plan.rows))

    def max_runs(self, rows: int) -> int:
        return rows

    def idle(self) -> bool:
        return True


class OnCard(Computes):
    """The same with a stream; an event is the clock's time, and has passed when the clock says so."""

    stream = "the stream"


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0
        self.passed = True

    def record(self, stream: str) -> None:
        assert stream == OnCard.stream
        self.at = CLOCK.now

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: Event) -> float:
        assert end.passed
        return 1e3 * (end.at - self.at)


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    CLOCK.now = 100.0
    monkeypatch.setattr(step_times, "time", CLOCK)
    return CLOCK


def plan(*lengths: int) -> StepPlan:
    rows = tuple(
        StepRow(slot=at, num_tokens=num, tokens=None, start=0, blocks=(0,), sample=None)
        for at, num in enumerate(lengths)
    )
    return StepPlan(0, rows)


def test_on_a_cpu_what_the_runner_takes_is_the_devices(clock: Clock) -> None:
    timed = TimedRunner(Computes(clock, launch_s=3.0, collect_s=1.0, depth=1))
    timed.launch(plan(20, 1))
    timed.collect()
    for _ in range(2):
        clock.now += 0.5  # the scheduler's
        timed.launch(plan(1, 1))
        timed.collect()
    totals = timed.take()
    assert totals["prompts"] == StepTotals(1, 2, 21, step_s=4.0, host_s=0.0, device_s=4.0, device_steps=1)
    assert totals["decode"] == StepTotals(2, 4, 4, step_s=9.0, host_s=1.0, device_s=8.0, device_steps=2)
    assert totals["decode"].means() == {
        "steps": 2,
        "rows": 2.0,
        "tokens": 2.0,
        "step_us": 4.5e6,
        "host_us": 0.5e6,
        "device_us": 4e6,
    }


def test_time_between_two_batches_belongs_to_no_step(clock: Clock) -> None:
    timed = TimedRunner(Computes(clock, launch_s=1.0, collect_s=1.0, depth=1))
    for _ in range(2):
        clock.now += 1000.0
        timed.launch(plan(1))
        timed.collect()
        assert timed.take()["decode"].step_s == pytest.approx(2.0)
    assert timed.take() == {}
    for _ in range(2):
        clock.now += 1000.0
        timed.pause()
        timed.launch(plan(1))
        timed.collect()
    assert timed.take()["decode"].step_s == pytest.approx(4.0)


def test_with_two_steps_under_way_the_times_of_all_steps_add_up_to_the_batch(clock: Clock) -> None:
    timed = TimedRunner(Computes(clock, launch_s=1.0, collect_s=2.0, depth=2))
    began = clock.now
    timed.launch(plan(5))
    for _ in range(4):
        clock.now += 0.25
        timed.launch(plan(1))
        timed.collect()
    timed.collect()
    totals = timed.take()
    assert sum(kind.step_s for kind in totals.values()) == pytest.approx(clock.now - began)
    assert sum(kind.steps for kind in totals.values()) == 5


def test_on_a_card_events_tell_the_devices_share_and_collect_is_waiting(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timed = TimedRunner(OnCard(clock, launch_s=1.0, collect_s=5.0, depth=1))
    for _ in range(3):
        clock.now += 0.5
        timed.launch(plan(1))
        timed.collect()
    total = timed.take()["decode"]
    assert total.device_s == pytest.approx(3.0)  # from one event of the launch to the other
    assert total.host_s == pytest.approx(1.0 + 2 * 1.5)
    assert total.device_steps == 3


def test_an_event_that_has_not_passed_is_read_later_and_waited_for_at_the_end(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Event] = []

    def event(enable_timing: bool) -> Event:
        made.append(Event(enable_timing))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    timed = TimedRunner(OnCard(clock, launch_s=1.0, collect_s=1.0, depth=1))
    for _ in range(2):
        timed.launch(plan(1))
        made[-1].passed = False
        timed.collect()
    assert len(made) == 4, "events under way are not used again"
    assert timed.take()["decode"].device_steps == 2
    timed.launch(plan(1))
    assert len(made) == 4, "others are"


def test_a_step_that_fails_is_counted_and_its_error_goes_on(clock: Clock) -> None:
    runner: Any = Computes(clock, launch_s=1.0, collect_s=1.0, depth=1)
    timed = TimedRunner(runner)
    timed.launch(plan(1))
    runner.fails = True
    with pytest.raises(RuntimeError, match="the step failed"):
        timed.collect()
    assert timed.take()["decode"].steps == 1
    assert timed.idle()
