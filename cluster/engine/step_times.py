"""Where the time of steps goes, seen from outside of a runner: the step thread's and the device's share.

    launch(N+1) |collect(N) ........|schedule, emit|launch(N+2)|collect(N+1) ........|
                 a step's time: from the end of one collect to the end of the next

A step of one token a row is a decode step; any other one computes prompts. For `diptych bench offline`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from diptych.protos.ports import Runner, StepCost
from diptych.protos.step import StepPlan, StepResult

from .step_profile import StepProfile


@dataclass(slots=True)
class StepTotals:
    """Sums over the steps of one kind. Seconds."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    step_s: float = 0.0
    host_s: float = 0.0
    device_s: float = 0.0
    device_steps: int = 0  # of which device_s is

    def means(self) -> dict[str, float | int | None]:
        """As JSON has them: times in microseconds. None: the device was not timed."""
        each = 1e6 / self.steps
        device = round(1e6 * self.device_s / self.device_steps, 1) if self.device_steps else None
        return {
            "steps": self.steps,
            "rows": round(self.rows / self.steps, 1),
            "tokens": round(self.tokens / self.steps, 1),
            "step_us": round(each * self.step_s, 1),
            "host_us": round(each * self.host_s, 1),
            "device_us": device,
        }


@dataclass(slots=True)
class _Launched:
    kind: str
    plan: StepPlan
    began: float
    launch_s: float
    events: tuple[Any, Any] | None


class TimedRunner:
    """Implements ports.Runner over another one, whose steps it times.

    On a card (a runner with a `stream`) the host's share is what is not spent in `collect`, and the device's is told by
    events: from the launch, or the end of the step before, to the end. Elsewhere the device is who calls.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.max_slots, self.max_step_tokens = runner.max_slots, runner.max_step_tokens
        self.vocab_size, self.depth = runner.vocab_size, runner.depth
        self.stream: Any = getattr(runner, "stream", None)
        self.profile: StepProfile | None = None  # set while no step is outstanding
        self._totals: dict[str, StepTotals] = {}
        self._outstanding: deque[_Launched] = deque()
        self._unread: deque[_Launched] = deque()  # whose events may not have passed yet
        self._spare: list[tuple[Any, Any]] = []
        self._last: float | None = None  # the end of the last collect

    @property
    def cost(self) -> StepCost | None:
        """See ports.Runner; known once the runner has been prepared, which is later than this wrapper."""
        return self.runner.cost

    @cost.setter
    def cost(self, cost: StepCost | None) -> None:
        self.runner.cost = cost

    def launch(self, plan: StepPlan) -> None:
        """See ports.Runner."""
        if self.profile is not None:
            self.profile.before_launch()
        events = self._events()
        began = time.perf_counter()
        if events is not None:
            events[0].record(self.stream)
        self.runner.launch(plan)
        if events is not None:
            events[1].record(self.stream)
        kind = "decode" if plan.num_tokens == len(plan.rows) else "prompts"
        self._outstanding.append(_Launched(kind, plan, began, time.perf_counter() - began, events))

    def collect(self) -> StepResult:
        """See ports.Runner."""
        step = self._outstanding.popleft()
        began = time.perf_counter()
        try:
            return self.runner.collect()
        finally:
            now = time.perf_counter()
            self._note(step, now - (step.began if self._last is None else self._last), now - began)
            self._last = now
            if self.profile is not None:
                self.profile.after_collect()

    def max_runs(self, rows: int) -> int:
        """See ports.Runner."""
        return self.runner.max_runs(rows)

    def idle(self) -> bool:
        """See ports.Runner."""
        return self.runner.idle()

    def take(self) -> dict[str, StepTotals]:
        """What was summed since the last time, by kind of step: "decode", "prompts". While no step is outstanding."""
        self._read_events(wait=True)
        found, self._totals = self._totals, {}
        self.pause()
        return found

    def pause(self) -> None:
        """Between two batches: the next step counts from its own launch."""
        self._last = None

    def _note(self, step: _Launched, step_s: float, collect_s: float) -> None:
        total = self._totals.setdefault(step.kind, StepTotals())
        total.steps += 1
        total.rows += len(step.plan.rows)
        total.tokens += step.plan.num_tokens
        total.step_s += step_s
        if step.events is None:
            device_s = step.launch_s + collect_s
            total.host_s += max(step_s - device_s, 0.0)
            total.device_s += device_s
            total.device_steps += 1
        else:
            total.host_s += max(step_s - collect_s, 0.0)
            self._unread.append(step)
            self._read_events(wait=False)

    def _events(self) -> tuple[Any, Any] | None:
        if self.stream is None:
            return None
        if self._spare:
            return self._spare.pop()
        cuda: Any = torch.cuda  # whose constructors are not typed
        return cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def _read_events(self, *, wait: bool) -> None:
        while self._unread:
            step = self._unread[0]
            assert step.events is not None
            begin, end = step.events
            if wait:
                end.synchronize()
            elif not end.query():
                return
            total = self._totals.setdefault(step.kind, StepTotals())
            total.device_s += begin.elapsed_time(end) / 1e3
            total.device_steps += 1
            self._spare.append(step.events)
            self._unread.popleft()
