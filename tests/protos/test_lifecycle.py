"""The pure parts that both workers share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from diptych.protos.lifecycle import Deadlines, RowMaker, StageTimer, finish_reason, logit_rules, refusal
from diptych.protos.step import LogitRules, SampleSpec, StepRow
from diptych.protos.types import FinishReason, GenerateRequest, SamplingParams, StageTimes, TokenLogprobs, TransferKey

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


# ---- rows with everything that can be asked for -----------------------------------------------


def test_rules_exist_only_where_something_is_set() -> None:
    assert logit_rules(SamplingParams(max_tokens=3, stop_token_ids=frozenset({2})), 5) is None
    assert logit_rules(SamplingParams(max_tokens=3, min_tokens=2), 5) is None, "there is nothing to hold back"
    held = logit_rules(SamplingParams(max_tokens=3, min_tokens=2, stop_token_ids=frozenset({9, 2})), 5)
    assert held == LogitRules(num_prompt=5, min_tokens=2, stop_token_ids=(2, 9))
    for change in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((3, 1.0),)},
        {"bad_words": ((3, 4),)},
        {"allowed_token_ids": ()},
        {"allowed_token_ids": (1, 2)},
    ):
        rules = logit_rules(replace(PARAMS, **change), 5)
        ((name, value),) = change.items()
        assert rules is not None
        assert getattr(rules, name) == value


def test_all_rows_share_one_rules_object_and_the_history_is_given_once_per_slot() -> None:
    maker = rows([7, 8, 9], replace(PARAMS, repetition_penalty=1.2, min_p=0.1, logprobs=4))

    def sample(tokens: list[int], start: int) -> SampleSpec:
        found = maker.next_row(tokens, start, len(tokens) - start, slot=0, blocks=[0]).sample
        assert found is not None
        return found

    assert maker.next_row([7, 8, 9], 0, 2, slot=0, blocks=[0]).sample is None
    first, second = sample([7, 8, 9], 2), sample([7, 8, 9, 1], 3)
    assert (first.history, second.history) == ((7, 8, 9), None)
    assert first.rules is second.rules is maker.rules is not None
    assert (first.min_p, first.logprobs) == (0.1, 4)
    maker.new_slot()
    assert sample([7, 8, 9, 1, 2], 0).history == (7, 8, 9, 1, 2)
    assert sample([7, 8, 9, 1, 2, 3], 5).history is None


@pytest.mark.parametrize("change", [{}, {"logit_bias": ((1, 2.0),)}, {"bad_words": ((1,),)}])
def test_no_history_where_no_rule_looks_back(change: dict[str, object]) -> None:
    sample = rows([7, 8, 9], replace(PARAMS, **change)).next_row([7, 8, 9], 0, 3, slot=0, blocks=[0]).sample  # type: ignore[arg-type]
    assert sample is not None
    assert sample.history is None


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_prompt", [1, 2, 5, 8])
def test_every_prompt_position_is_asked_for_and_told_once(num_prompt: int, chunk: int) -> None:
    prompt = list(range(num_prompt))
    maker = rows(prompt, replace(PARAMS, prompt_logprobs=0))
    assert maker.max_cached_tokens(num_prompt) == 0
    told: list[int] = []
    for start in range(0, num_prompt, chunk):
        row = maker.next_row(prompt, start, min(chunk, num_prompt - start), slot=0, blocks=[0] * 8)
        stop = start + row.num_tokens
        assert row.next_token == (prompt[stop] if stop < num_prompt else None)
        if row.prompt_logprobs is None:
            assert stop == start + 1 == num_prompt, "only the last position alone has nothing to tell"
            continue
        answer = [position(at) for at in range(start + 1, stop + (row.next_token is not None))]
        news = maker.tell_prompt(row, answer)
        assert news is not None
        assert news.first == len(told) + 1
        told += [entry.rank for entry in news.logprobs]
    assert told == list(range(1, num_prompt))
    again = maker.next_row([*prompt, 50], 0, num_prompt + 1, slot=0, blocks=[0] * 8)
    assert again.prompt_logprobs is None, "what was told is not asked for again"
    assert maker.max_cached_tokens(num_prompt + 1) == num_prompt, "nor need it be computed again"


def position(at: int) -> TokenLogprobs:
    return TokenLogprobs(-1.0, at)


def test_what_is_computed_again_tells_only_the_rest() -> None:
    maker = rows(range(8), replace(PARAMS, prompt_logprobs=1))
    first = maker.next_row(range(8), 0, 3, slot=0, blocks=[0])
    assert maker.tell_prompt(first, [position(at) for at in (1, 2, 3)]) is not None
    assert maker.max_cached_tokens(8) == 3
    again = maker.next_row(range(8), 0, 8, slot=1, blocks=[0])
    assert (again.prompt_logprobs, again.next_token) == (1, None)
    news = maker.tell_prompt(again, [position(at) for at in range(1, 8)])
    assert news is not None
    assert (news.first, [entry.rank for entry in news.logprobs]) == (4, [4, 5, 6, 7])


def test_a_prompt_that_another_engine_told_of_is_like_any_other() -> None:
    maker = rows(range(8), replace(PARAMS, prompt_logprobs=1))
    maker.prompt_is_told()
    assert maker.max_cached_tokens(8) == 7
    assert maker.next_row(range(8), 0, 8, slot=0, blocks=[0]).prompt_logprobs is None


def test_an_answer_that_goes_on_tells_no_prompt_and_counts_from_the_same_rules() -> None:
    asked = replace(PARAMS, max_tokens=9, prompt_logprobs=1, presence_penalty=0.5)
    maker = RowMaker(GenerateRequest(key=key(1), prompt=(7, 8, 9), sampling=asked, resume=(4, 5)))
    assert maker.max_cached_tokens(5) == 4
    row = maker.next_row((7, 8, 9, 4, 5), 0, 5, slot=0, blocks=[0])
    assert row.prompt_logprobs is None
    assert row.sample is not None
    assert (row.sample.position, row.sample.history) == (5, (7, 8, 9, 4, 5))
    assert row.sample.rules == logit_rules(asked, 3), "the penalties count what was generated, wherever that was"


@pytest.mark.parametrize(
    ("resume", "changes", "words"),
    [
        ((4, 5), {}, None),
        ((4, 2, 5), {"max_tokens": 4}, None),
        ((4, 2), {"min_tokens": 2}, None),
        ((4, 2), {}, "complete with the 2 tokens of resume: stop"),
        ((4, 5, 6), {}, "complete with the 3 tokens of resume: length"),
        ((1,) * 7, {"max_tokens": 20}, "prompt and resume have 10 tokens: the context of 10 tokens"),
        ((4, 100), {}, "the resume holds the token id 100"),
    ],
)
def test_who_goes_on_with_an_answer_must_have_something_to_add(
    resume: tuple[int, ...], changes: dict[str, int], words: str | None
) -> None:
    sampling = replace(PARAMS, **changes)  # type: ignore[arg-type]
    request = GenerateRequest(key=key(1), prompt=(7, 8, 9), sampling=sampling, resume=resume)
    error = refusal(request, 10, 100)
    assert (error is None) if words is None else (words in str(error))


def test_a_stop_token_counts_only_after_min_tokens() -> None:
    held = replace(PARAMS, min_tokens=2, max_tokens=9)
    reasons = [finish_reason(held, 2, num_generated=n, num_prompt=1, max_context_tokens=100) for n in (1, 2, 3)]
    assert reasons == [None, None, FinishReason.STOP]
