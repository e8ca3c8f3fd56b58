"""Steps come back in the order of launching, to whoever launched them, whatever the runner does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest

from diptych.protos.errors import EngineFault, EngineLost
from diptych.protos.lifecycle import RowMaker
from diptych.protos.pipeline import Done, StepPipeline
from diptych.protos.ports import Runner, StepCost
from diptych.protos.step import StepPlan, StepResult
from diptych.protos.testing import FakeClock
from diptych.protos.types import GenerateRequest, SamplingParams, TokenLogprobs, TransferKey

PARAMS = SamplingParams(max_tokens=3)


class Scripted:
    """A runner that gives the results it was told to; an exception among them is raised, in collect or in launch."""

    max_slots = 1
    max_step_tokens = 8
    vocab_size = 100
    depth = 2
    cost: StepCost | None = None

    def __init__(self, *results: StepResult | Exception, refuses: dict[int, Exception] | None = None) -> None:
        self.results = deque(results)
        self.refuses = refuses or {}  # by step
        self.log: list[str] = []

    def launch(self, plan: StepPlan) -> None:
        if plan.step_id in self.refuses:
            raise self.refuses[plan.step_id]
        self.log.append(f"launch {plan.step_id}")

    def collect(self) -> StepResult:
        self.log.append("collect")
        result = self.results.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def max_runs(self, rows: int) -> int:
        return rows

    def idle(self) -> bool:
        return False


def plan(step_id: int, sampling: SamplingParams = PARAMS, num_tokens: int = 1) -> StepPlan:
    known = tuple(range(1, num_tokens + 1))
    maker = RowMaker(GenerateRequest(key=TransferKey(bytes(16)), prompt=known, sampling=sampling))
    return StepPlan(step_id, (maker.next_row(known, 0, num_tokens, slot=0, blocks=[0]),))


def pipeline(runner: Runner, clock: Callable[[], float] = lambda: 0.0) -> StepPipeline:
    return StepPipeline(runner, clock)


def only_outcome(result: StepResult, of: StepPlan) -> StepResult | EngineFault:
    told: list[StepResult | EngineFault] = []
    one = pipeline(Scripted(result))
    one.launch(of, told.append)
    one.settle(leave=0)
    (outcome,) = told
    return outcome


def test_results_reach_their_owners_in_order_and_as_late_as_asked() -> None:
    runner = Scripted(*(StepResult(at, (at,)) for at in (1, 2, 3)))
    steps, told = pipeline(runner), list[tuple[str, object]]()

    def owner(name: str) -> Done:
        return lambda outcome: told.append((name, outcome))

    steps.launch(plan(1), owner("a"))
    assert not steps.settle(leave=1)
    steps.launch(plan(2), owner("b"))
    assert steps.num_outstanding == 2
    assert steps.settle(leave=1)
    steps.launch(plan(3), owner("a"))
    assert steps.settle(leave=0)
    assert not steps.settle(leave=0)
    assert told == [("a", StepResult(1, (1,))), ("b", StepResult(2, (2,))), ("a", StepResult(3, (3,)))]
    assert runner.log == ["launch 1", "launch 2", "collect", "launch 3", "collect", "collect"]


def test_a_step_that_was_never_launched_fails_in_its_turn_and_nothing_is_collected_for_it() -> None:
    runner = Scripted(StepResult(1, (1,)), StepResult(3, (3,)), refuses={2: RuntimeError("no")})
    steps, told = pipeline(runner), list[StepResult | EngineFault]()
    left = []
    for at in (1, 2, 3):
        steps.launch(plan(at), told.append)
        steps.settle(leave=1)
        left.append(steps.num_outstanding)
    steps.settle(leave=0)
    assert left == [1, 0, 1], "nobody may go on from a step that never was"
    assert [type(outcome) for outcome in told] == [StepResult, EngineFault, StepResult]
    assert isinstance(told[1], EngineFault)
    assert "no" in told[1].detail
    assert "no" not in str(told[1]), "the client is told that it failed, not why"


def test_a_step_that_raises_in_collect_is_a_fault_of_that_step_alone() -> None:
    steps, told = pipeline(Scripted(RuntimeError("bad"), StepResult(2, (2,)))), list[StepResult | EngineFault]()
    for at in (1, 2):
        steps.launch(plan(at), told.append)
    steps.settle(leave=0)
    assert [type(outcome) for outcome in told] == [EngineFault, StepResult]


def test_a_lost_device_ends_whoever_drives_it() -> None:
    gone = EngineLost("the device is gone")
    with pytest.raises(EngineLost):
        pipeline(Scripted(refuses={1: gone})).launch(plan(1), lambda outcome: None)
    steps = pipeline(Scripted(gone))
    steps.launch(plan(1), lambda outcome: None)
    with pytest.raises(EngineLost):
        steps.settle(leave=0)


def test_seconds_that_two_steps_overlap_count_once() -> None:
    clock, spent = FakeClock(0.0), list[float]()
    steps = pipeline(Scripted(*(StepResult(at, (at,)) for at in (1, 2))), clock)

    def owner(began: float) -> Done:
        return lambda outcome: spent.append(steps.seconds_since(began))

    for at in (1, 2):
        steps.launch(plan(at), owner(clock()))
        clock.advance(1.0)
    steps.settle(leave=1)
    clock.advance(0.5)
    steps.settle(leave=0)
    assert spent == [2.0, 0.5], "both since the first launch: 2.5 s in all"


@pytest.mark.parametrize(
    "result", [StepResult(2, (5,)), StepResult(1, ()), StepResult(1, (None,)), StepResult(1, (5, 5))]
)
def test_a_result_that_does_not_fit_its_plan_is_a_fault(result: StepResult) -> None:
    assert isinstance(only_outcome(result, plan(1)), EngineFault)


def told(at: int) -> TokenLogprobs:
    return TokenLogprobs(-1.0, at)


@pytest.mark.parametrize(
    ("result", "fits"),
    [
        (StepResult(1, (5,), {0: told(1)}, {0: (told(1), told(2))}), True),
        (StepResult(1, (5,), {}, {0: (told(1), told(2))}), False),
        (StepResult(1, (5,), {0: told(1)}, {0: (told(1),)}), False),
        (StepResult(1, (5,), {0: told(1)}), False),
        (StepResult(1, (None,), faults=frozenset({0})), True),
        (StepResult(1, (5,), faults=frozenset({0})), False),
        (StepResult(1, (None,), faults=frozenset({0, 1})), False),
        (StepResult(1, (None,), faults=frozenset({0}), ruled_out=frozenset({0})), True),
        (StepResult(1, (5,), {0: told(1)}, {0: (told(1), told(2))}, ruled_out=frozenset({0})), False),
    ],
)
def test_a_result_must_have_all_that_was_asked_for_but_of_faulty_rows(result: StepResult, fits: bool) -> None:
    outcome = only_outcome(result, plan(1, replace(PARAMS, logprobs=0, prompt_logprobs=0), num_tokens=3))
    assert outcome is result if fits else isinstance(outcome, EngineFault)
