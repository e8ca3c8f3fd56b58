"""The pure parts that both workers share."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from diptych.protos.errors import EngineFault
from diptych.protos.lifecycle import Deadlines, RowMaker, StageTimer, execute, finish_reason
from diptych.protos.ports import Runner
from diptych.protos.step import StepPlan, StepResult, StepRow
from diptych.protos.types import FinishReason, GenerateRequest, SamplingParams, StageTimes, TransferKey

PARAMS = SamplingParams(max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, seed=11, stop_token_ids=frozenset({2}))


def key(number: int) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"))


def rows(prompt: Sequence[int], sampling: SamplingParams = PARAMS) -> RowMaker:
    return RowMaker(GenerateRequest(key=key(1), prompt=tuple(prompt), sampling=sampling))


def next_row(prompt: Sequence[int], start: int, num: int, *, slot: int, blocks: Sequence[int]) -> StepRow:
    return rows(prompt).next_row(prompt, start, num, slot=slot, blocks=blocks)


@pytest.mark.parametrize(
    ("token", "num_generated", "num_prompt", "expected"),
    [
        (1, 1, 5, None),
        (2, 1, 5, FinishReason.STOP),
        (2, 3, 5, FinishReason.STOP),
        (1, 3, 5, FinishReason.LENGTH),
        (1, 2, 7, None),
        (1, 2, 8, FinishReason.LENGTH),
    ],
)
def test_the_end_of_a_request(token: int, num_generated: int, num_prompt: int, expected: FinishReason | None) -> None:
    reason = finish_reason(PARAMS, token, num_generated=num_generated, num_prompt=num_prompt, max_context_tokens=10)
    assert reason is expected


@pytest.mark.parametrize(("start", "num_tokens"), [(0, 2), (0, 5), (2, 3), (4, 1)])
def test_a_row_samples_exactly_at_the_last_known_token(start: int, num_tokens: int) -> None:
    row = next_row([7, 8, 9, 10, 11], start, num_tokens, slot=3, blocks=[4, 5])
    assert row.tokens == (7, 8, 9, 10, 11)[start : start + num_tokens]
    assert (row.slot, row.start, row.num_tokens, row.blocks) == (3, start, num_tokens, [4, 5])
    if start + num_tokens < 5:
        assert row.sample is None
    else:
        assert row.sample is not None
        assert (row.sample.position, row.sample.seed, row.sample.top_k) == (5, 11, 4)


def test_stages_add_up_also_when_entered_again() -> None:
    timer = StageTimer(10.0)
    timer.enter("decode", 11.0)
    timer.enter("queue", 13.0)
    timer.enter("decode", 17.0)
    assert timer.read(25.0) == StageTimes(queue=5.0, decode=10.0)
    assert timer.read(26.0) == StageTimes(queue=5.0, decode=11.0)


class Strange:
    """A runner whose result does not fit the plan."""

    max_slots = 1
    max_step_tokens = 8

    def __init__(self, result: StepResult) -> None:
        self.result = result

    def launch(self, plan: StepPlan) -> None:
        pass

    def collect(self) -> StepResult:
        return self.result


@pytest.mark.parametrize(
    "result", [StepResult(2, (5,)), StepResult(1, ()), StepResult(1, (None,)), StepResult(1, (5, 5))]
)
def test_a_result_that_does_not_fit_its_plan_is_a_fault(result: StepResult) -> None:
    runner: Runner = Strange(result)
    plan = StepPlan(1, (next_row([1], 0, 1, slot=0, blocks=[0]),))
    with pytest.raises(EngineFault):
        execute(runner, plan)
    assert execute(Strange(StepResult(1, (5,))), plan).tokens == (5,)


def test_deadlines_come_due_in_order_and_forget_who_left() -> None:
    """Against a plain list, with equal deadlines and keys that leave early."""
    rng = random.Random(0)
    deadlines, model = Deadlines(), dict[TransferKey, float]()
    now = 0.0
    for number in range(3000):
        deadline = now + rng.randrange(50)
        deadlines.add(key(number), deadline)
        model[key(number)] = deadline
        deadlines.add(key(10_000 + number), None)
        for gone in rng.sample(sorted(model), min(len(model), rng.randrange(3))):
            deadlines.discard(gone)
            del model[gone]
        assert deadlines.earliest() == min(model.values(), default=None)
        now += rng.choice([0, 0, 1])
        due = deadlines.pop_due(now)
        assert due == [k for _, k in sorted((d, k) for k, d in model.items() if d <= now)]
        for gone in due:
            del model[gone]


def test_deadlines_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for number in range(5000):
        deadlines.add(key(number), 1e9 + number)
        deadlines.discard(key(number))
    assert len(deadlines._heap) <= 64 + 1
    assert deadlines.earliest() is None
