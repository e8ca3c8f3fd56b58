"""Steps on their way through a runner, the oldest first: launched by the workers of an engine, each result handed to
whoever launched the step. Called from the step thread; knows nothing of what is in a step.

launch N+1 | collect N, its owner's `done` | launch N+2 | collect N+1 | ...        runner.depth = 2
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .barrier import PASSES
from .errors import EngineFault
from .ports import Clock, Runner
from .step import StepPlan, StepResult

log = logging.getLogger(__name__)

# Rows in a result's `faults` are the owner's to end; no other row lacks anything that its plan asked for.
Done = Callable[[StepResult | EngineFault], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    plan: StepPlan
    done: Done
    fault: EngineFault | None  # why it was never launched


class StepPipeline:
    """One for a runner: what it computes comes back in the order of launching, whoever asked for it.

    Whatever goes wrong in the runner is an EngineFault of its step, in its turn; the cause is in the log. EngineLost
    alone goes through, for with the device the engine has ended.
    """

    def __init__(self, runner: Runner, clock: Clock) -> None:
        self.runner = runner
        self._clock = clock
        self._steps: deque[_Step] = deque()
        self._free_at = float("-inf")

    @property
    def num_outstanding(self) -> int:
        """Steps launched and not collected."""
        return len(self._steps)

    def launch(self, plan: StepPlan, done: Done) -> None:
        """Start a step; a later `settle` calls `done`, once, with its result or its fault."""
        fault = None
        try:
            self.runner.launch(plan)
        except PASSES:
            raise
        except BaseException as exc:  # a library's panic is no Exception
            fault = _fault(plan, exc)
        self._steps.append(_Step(plan, done, fault))

    def settle(self, leave: int) -> bool:
        """Collect the oldest steps until `leave` are outstanding. False: there were no more.

        After a step that could not be launched none is left: no other goes on from where it should have been.
        """
        collected = False
        if self._steps and self._steps[-1].fault is not None:
            leave = 0
        while len(self._steps) > leave:
            step = self._steps.popleft()
            step.done(step.fault or self._collect(step.plan))
            self._free_at = self._clock()
            collected = True
        return collected

    def seconds_since(self, began: float) -> float:
        """What a step, planned at `began`, has taken by now; while another was dealt with, it is that one's time."""
        return self._clock() - max(began, self._free_at)

    def _collect(self, plan: StepPlan) -> StepResult | EngineFault:
        try:
            result = self.runner.collect()
        except PASSES:
            raise
        except BaseException as exc:
            return _fault(plan, exc)
        if not _fits(plan, result):
            log.error("step %d came back as %r", plan.step_id, result)
            return EngineFault(
                "the engine failed while computing this request", "the step's result does not fit its plan"
            )
        for at in sorted(result.faults - result.ruled_out):
            row = plan.rows[at]
            log.error("step %d: row %d, slot %d, from position %d: not finite", plan.step_id, at, row.slot, row.start)
        return result


def _fault(plan: StepPlan, exc: BaseException) -> EngineFault:
    log.error("step %d with %d rows raised", plan.step_id, len(plan.rows), exc_info=exc)
    fault = EngineFault("the engine failed while computing this request", f"{type(exc).__name__}: {exc}")
    fault.__cause__ = exc
    return fault


def _fits(plan: StepPlan, result: StepResult) -> bool:
    if result.step_id != plan.step_id or len(result.tokens) != len(plan.rows):
        return False
    for at, (row, token) in enumerate(zip(plan.rows, result.tokens, strict=True)):
        sound = at not in result.faults
        sampled = row.sample is not None and sound
        told = row.num_tokens - (row.next_token is None) if row.prompt_logprobs is not None and sound else 0
        if (
            (token is not None) != sampled
            or (at in result.logprobs) != (sampled and row.sample is not None and row.sample.logprobs is not None)
            or len(result.prompt_logprobs.get(at, ())) != told
        ):
            return False
    return result.ruled_out <= result.faults and all(0 <= at < len(plan.rows) for at in result.faults)
