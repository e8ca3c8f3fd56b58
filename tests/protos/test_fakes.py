"""The fakes must notice what they are there to notice."""

from __future__ import annotations

import pytest

from diptych.protos.lifecycle import RowMaker
from diptych.protos.step import StepPlan, StepRow
from diptych.protos.testing import EchoRunner, FakeReceiver, FakeSender, Ledger, echo_logprobs, echo_reference
from diptych.protos.types import (
    EngineId,
    EngineRef,
    Finish,
    FinishReason,
    GenerateRequest,
    PromptLogprobs,
    Role,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
    TransferKey,
)

PARAMS = SamplingParams(max_tokens=3)
PEER = EngineRef(EngineId("p"), 1, "")
KEY = TransferKey(bytes(16))
PROMPT = [5, 6, 7, 8, 9, 10]


def next_row(tokens: list[int], start: int, num: int, *, slot: int, blocks: list[int]) -> StepRow:
    request = GenerateRequest(key=KEY, prompt=(0,), sampling=PARAMS)
    return RowMaker(request).next_row(tokens, start, num, slot=slot, blocks=blocks)


def run(runner: EchoRunner, tokens: list[int], start: int, num: int, blocks: list[int], slot: int = 0) -> int | None:
    runner.launch(StepPlan(1, (next_row(tokens, start, num, slot=slot, blocks=blocks),)))
    return runner.collect().tokens[0]


def echo() -> EchoRunner:
    return EchoRunner(num_blocks=8, block_tokens=2, max_slots=4)


def test_any_blocks_and_chunks_give_the_reference() -> None:
    runner = echo()
    assert run(runner, PROMPT, 0, 4, [3, 1, 7]) is None
    token = run(runner, PROMPT, 4, 2, [3, 1, 7])
    assert [token] == echo_reference(PROMPT, 1)
    assert run(runner, [*PROMPT, token or 0], 6, 1, [3, 1, 7, 0]) == echo_reference(PROMPT, 2)[1]


@pytest.mark.parametrize("blocks", [[1, 3, 7], [3, 1, 6], [3, 0, 7]])
def test_a_wrong_block_changes_the_token(blocks: list[int]) -> None:
    runner = echo()
    run(runner, PROMPT[:5], 0, 5, [3, 1, 7])
    assert run(runner, PROMPT, 5, 1, blocks) != echo_reference(PROMPT, 1)[0]


def test_a_missing_or_misplaced_position_changes_the_token() -> None:
    runner = echo()
    run(runner, PROMPT[:5], 0, 4, [3, 1, 7])
    assert run(runner, PROMPT, 5, 1, [3, 1, 7]) != echo_reference(PROMPT, 1)[0], "position 4 was never computed"
    same = echo()
    run(same, [5, 5], 0, 2, [0])
    same.write([1], 0, same.read([0], 2))
    assert run(same, [5, 5, 5, 5, 5], 4, 1, [0, 1, 2]) != echo_reference([5] * 5, 1)[0], "equal tokens, other places"


def test_a_token_by_reference_is_the_last_one_of_its_slot() -> None:
    runner = echo()
    first, second = echo_reference(PROMPT, 2)
    assert run(runner, PROMPT, 0, 6, [3, 1, 7, 0], slot=2) == first
    sample = next_row([*PROMPT, first], 6, 1, slot=2, blocks=[3, 1, 7, 0]).sample
    runner.launch(
        StepPlan(2, (StepRow(slot=2, num_tokens=1, tokens=None, start=6, blocks=[3, 1, 7, 0], sample=sample),))
    )
    assert runner.collect().tokens == (second,)


def test_rows_that_collide_are_refused() -> None:
    rows = [next_row([1, 2], 0, 2, slot=slot, blocks=[block]) for slot, block in [(0, 0), (0, 1), (1, 0)]]
    for pair in ([rows[0], rows[1]], [rows[0], rows[2]]):
        with pytest.raises(AssertionError):
            echo().launch(StepPlan(1, tuple(pair)))


def test_a_sender_notices_kv_that_changes_before_release() -> None:
    runner = echo()
    sender = FakeSender(runner)
    run(runner, PROMPT, 0, 6, [3, 1, 7])
    sender.open(KEY, PEER, 6)
    sender.computed(KEY, 6, [3, 1, 7])
    sender.finish(KEY, 1, final=False)
    runner.write([1], 0, [(0, 0)])
    with pytest.raises(AssertionError, match="changed"):
        sender.release(KEY)


def test_a_receiver_writes_until_its_last_event() -> None:
    runner = echo()
    receiver = FakeReceiver(runner)
    receiver.expect(KEY, PEER, 6, 2)
    receiver.want(KEY)
    run(runner, PROMPT[:2], 0, 2, [3])
    receiver.grant(KEY, [3, 1, 7])
    runner.write([1], 0, [(2, 7)])
    receiver.scribble()
    assert runner.read([3, 1, 7], 3)[2] != (2, 7)
    receiver.commit(KEY, PROMPT, 1)
    receiver.scribble()
    assert runner.read([3, 1, 7], 6) == list(enumerate(PROMPT))


@pytest.mark.parametrize("broken", ["gap", "repeat", "after", "twice", "empty"])
def test_a_ledger_notices_what_no_worker_may_emit(broken: str) -> None:
    ledger = Ledger()
    out = StepOutput()
    out.add(KEY, 0, 5)
    ledger(out)
    second = StepOutput()
    if broken in {"gap", "repeat", "after"}:
        second.add(KEY, {"gap": 2, "repeat": 0, "after": 1}[broken], 6)
    if broken in {"after", "twice"}:
        ended = StepOutput()
        ended.finishes.append(Finish(key=KEY, role=Role.DECODE, reason=FinishReason.STOP))
        ledger(ended)
    if broken == "twice":
        second.finishes.append(Finish(key=KEY, role=Role.DECODE, reason=FinishReason.STOP))
    with pytest.raises(AssertionError):
        ledger(second)


def test_an_echo_runner_notices_the_history_of_another_sequence() -> None:
    sampling = SamplingParams(max_tokens=3, repetition_penalty=1.5)
    makers = [RowMaker(GenerateRequest(key=KEY, prompt=tuple(PROMPT[:n]), sampling=sampling)) for n in (6, 5)]
    runner = echo()
    runner.launch(StepPlan(1, (makers[0].next_row(PROMPT, 0, 6, slot=0, blocks=[0, 1, 2]),)))
    token = runner.collect().tokens[0]
    assert token is not None
    runner.launch(StepPlan(2, (makers[0].next_row([*PROMPT, token], 6, 1, slot=0, blocks=[0, 1, 2, 3]),)))
    runner.collect()
    makers[1].next_row(PROMPT[:5], 0, 5, slot=0, blocks=[4, 5, 6])  # takes the history that was due
    with pytest.raises(AssertionError, match="history"):
        runner.launch(StepPlan(3, (makers[1].next_row(PROMPT[:5], 0, 5, slot=0, blocks=[4, 5, 6]),)))


def test_a_poisoned_row_comes_back_as_a_fault_and_leaves_garbage() -> None:
    runner = echo()
    runner.poison = lambda row: row.slot == 1
    rows = [next_row(PROMPT, 0, 6, slot=slot, blocks=[3 * slot, 3 * slot + 1, 3 * slot + 2]) for slot in (0, 1)]
    runner.launch(StepPlan(1, tuple(rows)))
    result = runner.collect()
    assert result.tokens == (echo_reference(PROMPT, 1)[0], None)
    assert result.faults == {1}
    assert runner.read([3], 1) != [(0, PROMPT[0])]


def test_logprobs_name_the_guess_first_and_rank_the_token() -> None:
    guess = echo_reference(PROMPT, 1)[0]
    sure, unsure = echo_logprobs(PROMPT, guess, 2), echo_logprobs(PROMPT, guess + 4, 2)
    assert (sure.rank, sure.logprob, sure.top[0]) == (1, -1.0, (guess, -1.0))
    assert (unsure.rank, unsure.logprob) == (5, -5.0)
    assert [logprob for _, logprob in sure.top] == [-1.0, -2.0]


@pytest.mark.parametrize("broken", ["gap", "repeat", "late", "empty"])
def test_a_ledger_notices_prompt_logprobs_that_no_worker_may_emit(broken: str) -> None:
    ledger, told = Ledger(), TokenLogprobs(-1.0, 1)
    ledger(StepOutput(prompt_logprobs=[PromptLogprobs(KEY, 1, (told, told))]))
    out = StepOutput(prompt_logprobs=[PromptLogprobs(KEY, {"gap": 4, "repeat": 2}.get(broken, 3), (told,))])
    if broken == "empty":
        out = StepOutput(prompt_logprobs=[PromptLogprobs(KEY, 3, ())])
    if broken == "late":
        first = StepOutput()
        first.add(KEY, 0, 5, told)
        ledger(first)
        assert ledger.logprobs == {KEY: [told]}
    with pytest.raises(AssertionError):
        ledger(out)
