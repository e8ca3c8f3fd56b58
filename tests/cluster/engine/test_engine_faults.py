"""What an engine's edges do when the fault plan says so, and that they do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from diptych.cluster.engine.faults import FaultyFrames, FaultyLine, FaultyRunner, faulty_delivery, pass_point
from diptych.protos import engine_pb2 as pb
from diptych.protos.errors import EngineFault
from diptych.protos.faults import Action, Fault, FaultPlan, FaultRule, FaultSettings, Point
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Closed
from diptych.protos.step import SampleSpec, StepPlan, StepResult, StepRow
from diptych.protos.testing import EchoRunner
from diptych.protos.types import TransferKey


class Later:
    """Timers that run when the test says."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, seconds: float, action: Callable[[], None]) -> None:
        self.waiting.append((seconds, action))

    def pass_time(self) -> None:
        waiting, self.waiting = self.waiting, []
        for _, action in waiting:
            action()


def plan(**rule: object) -> FaultPlan:
    return FaultPlan(FaultSettings(rules=(FaultRule.model_validate({"nth": (1,), **rule}),)), me="decode-0")


DROP, DUPLICATE = Fault(Action.DROP), Fault(Action.DUPLICATE)
DELAY, REORDER = Fault(Action.DELAY, delay_s=0.5), Fault(Action.REORDER, delay_s=0.5)


def line() -> tuple[FaultyLine[int], list[int], Later]:
    got: list[int] = []
    later = Later()
    return FaultyLine(got.append, later), got, later


def test_a_line_without_faults_hands_everything_on_in_order() -> None:
    made, got, later = line()
    for item in range(5):
        made.put(item)
    assert got == [0, 1, 2, 3, 4]
    assert not later.waiting


def test_what_is_dropped_never_comes_and_what_is_doubled_comes_twice() -> None:
    made, got, _ = line()
    for item, fault in enumerate((DROP, None, DUPLICATE, None)):
        made.put(item, fault)
    assert got == [1, 2, 2, 3]


def test_what_is_late_holds_up_what_follows() -> None:
    made, got, later = line()
    made.put(0, DELAY)
    made.put(1)
    made.put(2, DELAY)
    made.put(3)
    assert got == []
    assert [seconds for seconds, _ in later.waiting] == [0.5, 0.5]
    later.pass_time()
    made.put(4)
    assert got == [0, 1, 2, 3, 4]


def test_what_is_reordered_comes_after_the_next_one_or_when_its_time_is_over() -> None:
    made, got, later = line()
    made.put(0, REORDER)
    assert got == []
    made.put(1)
    assert got == [1, 0]
    made.put(2, REORDER)
    later.pass_time()
    assert got == [1, 0, 2]
    later.pass_time()
    made.put(3)
    assert got == [1, 0, 2, 3], "nothing comes twice"


def tokens(*values: int) -> pb.EngineFrame:
    rows = range(len(values))
    return pb.EngineFrame(tokens=pb.StepTokens(handle=rows, index=rows, token=values))


def frames(made: FaultPlan) -> tuple[FaultyFrames, list[pb.EngineFrame], list[str]]:
    got: list[pb.EngineFrame] = []
    failed: list[str] = []
    fail = partial(failed.append, "failed")
    return FaultyFrames(made, router="r", line=FaultyLine(got.append, Later()), fail=fail), got, failed


def test_frames_of_tokens_fail_apart_from_frames_of_status() -> None:
    send, got, failed = frames(plan(point="session.tokens", action="drop"))
    status, welcome = pb.EngineFrame(status=pb.Status()), pb.EngineFrame(welcome=pb.Welcome())
    for frame in (welcome, status, tokens(1), tokens(2)):
        send(frame)
    assert got == [welcome, status, tokens(2)]
    assert not failed


def test_a_frame_cut_short_has_columns_that_make_no_sense() -> None:
    send, got, _ = frames(plan(point="session.tokens", action="truncate"))
    frame = tokens(1, 2)
    send(frame)
    assert len(got[0].tokens.handle) == 2
    assert len(got[0].tokens.index) == 3
    assert frame == tokens(1, 2), "the frame of other routers is not touched"


def test_a_raise_ends_the_session() -> None:
    send, got, failed = frames(plan(point="session.status", action="raise"))
    send(pb.EngineFrame(status=pb.Status()))
    assert (got, failed) == ([], ["failed"])


def step(step_id: int, prompt: tuple[int, ...] | None) -> StepPlan:
    sample = SampleSpec(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=len(prompt or (1,)))
    row = StepRow(slot=0, num_tokens=len(prompt or (1,)), tokens=prompt, start=0, blocks=(0,), sample=sample)
    return StepPlan(step_id, (row,))


def outcomes(runner: FaultyRunner, *plans: StepPlan) -> list[StepResult | EngineFault]:
    """What the owner of each step is told."""
    pipeline, told = StepPipeline(runner, lambda: 0.0), list[StepResult | EngineFault]()
    for one in plans:
        pipeline.launch(one, told.append)
        pipeline.settle(leave=0)
    return told


def test_a_step_that_raises_is_a_fault_of_that_step_alone() -> None:
    bare = EchoRunner(max_slots=2, max_step_tokens=8, num_blocks=2, block_tokens=4)
    runner = FaultyRunner(bare, plan(point="engine.step", action="raise", nth=(2,)))
    assert (runner.max_slots, runner.max_step_tokens, runner.vocab_size) == (2, 8, bare.vocab_size)
    assert (runner.depth, runner.cost, runner.idle()) == (bare.depth, None, False)
    first, second, third = outcomes(runner, *(step(at, (5, 6)) for at in range(3)))
    assert isinstance(second, EngineFault)
    assert isinstance(first, StepResult)
    assert isinstance(third, StepResult)
    assert third.tokens == first.tokens


def test_a_step_can_fail_for_a_token_of_its_prompts() -> None:
    runner = FaultyRunner(
        EchoRunner(max_slots=2, max_step_tokens=8, num_blocks=2, block_tokens=4),
        plan(point="engine.step", action="raise", message="* 66 *", nth=(), probability=1.0),
    )
    sound = outcomes(runner, *(step(0, prompt) for prompt in ((6, 166, 660), (6, 6))))
    assert all(isinstance(one, StepResult) for one in sound)
    felled = outcomes(runner, *(step(0, prompt) for prompt in ((66,), (1, 66), (66, 1))))
    assert all(isinstance(one, EngineFault) for one in felled)


def test_a_moment_can_take_longer_or_fail() -> None:
    pass_point(plan(point="engine.start", action="delay", delay_s=0.001), Point.ENGINE_START)
    with pytest.raises(EngineFault, match="injected"):
        pass_point(plan(point="engine.drain", action="raise"), Point.ENGINE_DRAIN)


def test_news_of_a_transfer_is_delivered_once_whatever_the_plan_says_of_other_kinds() -> None:
    got: list[object] = []
    deliver = faulty_delivery(plan(point="hinge.deliver", action="delay", message="released"), got.append)
    event = Closed(TransferKey(b"k" * 16))
    deliver(event)
    assert got == [event]
