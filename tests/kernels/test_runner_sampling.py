"""Rules, logprobs and faults through the runner: what it keeps by slot, and that rows stay apart."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.kernels.history import GROWTH, TokenLog
from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.ops.sampling import reference
from diptych.kernels.runner import ModelRunner
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.protos.errors import EngineFault
from diptych.protos.step import LogitRules, SampleSpec, StepPlan, StepResult, StepRow

BLOCK = 4
EACH = 20  # blocks of a slot: slot s has blocks EACH * s ...
NEW = 12
GREEDY = SampleSpec(0.0, 1.0, 0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32)


def make_runner(model: LoadedModel) -> tuple[ModelRunner, list[tuple[Tensor, Tensor]]]:
    shape = (8 * EACH, model.kv_heads, BLOCK, model.head_dim)
    kv = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.layers)]
    return ModelRunner(model, kv, block_tokens=BLOCK, max_slots=8, max_step_tokens=256), kv


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 512) for _ in range(length))


def row_of(slot: int, tokens: tuple[int, ...] | None, start: int, sample: SampleSpec | None, **fields: Any) -> StepRow:
    """`sample` gets its position, and its history when the row brings tokens from the start."""
    num = 1 if tokens is None else len(tokens)
    if sample is not None:
        sample = replace(sample, position=start + num)
        if sample.rules is not None and sample.rules.needs_history and tokens is not None and start == 0:
            sample = replace(sample, history=tokens)
    blocks = range(EACH * slot, EACH * (slot + 1))
    return StepRow(slot=slot, num_tokens=num, tokens=tokens, start=start, blocks=blocks, sample=sample, **fields)


def run(runner: ModelRunner, *rows: StepRow) -> StepResult:
    runner.launch(StepPlan(0, rows))
    return runner.collect()


def generate(
    runner: ModelRunner, prompts: list[tuple[int, ...]], samples: list[SampleSpec], count: int = NEW
) -> tuple[list[list[int]], list[StepResult]]:
    """Sequence i in slot i; always one step ahead of what was read."""
    runner.launch(StepPlan(0, tuple(row_of(i, p, 0, s) for i, (p, s) in enumerate(zip(prompts, samples, strict=True)))))
    results = []
    for step in range(1, count):
        rows = [row_of(i, None, len(p) + step - 1, s) for i, (p, s) in enumerate(zip(prompts, samples, strict=True))]
        runner.launch(StepPlan(step, tuple(rows)))
        results.append(runner.collect())
    results.append(runner.collect())
    assert not any(result.faults for result in results)
    return [[result.tokens[i] or 0 for result in results] for i in range(len(prompts))], results


def with_rules(prompt: tuple[int, ...], sample: SampleSpec = GREEDY, **fields: Any) -> SampleSpec:
    return replace(sample, rules=LogitRules(num_prompt=len(prompt), **fields))


def test_rules_give_the_tokens_of_transformers_generate(model: LoadedModel, theirs: Any) -> None:
    """In one batch, with a row that has no rules, and launched before the last token is read."""
    runner, _ = make_runner(model)
    prompts = [prompt_of(n, seed=n) for n in (9, 1, 17, 6)]

    def wanted(prompt: tuple[int, ...], **options: Any) -> list[int]:
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    plain = wanted(prompts[3], eos_token_id=None)
    words = [[plain[0]], plain[2:4], plain[5:8]]
    stops = wanted(prompts[1], eos_token_id=None)[:1]
    samples = [
        with_rules(prompts[0], repetition_penalty=1.8),
        with_rules(prompts[1], min_tokens=NEW, stop_token_ids=tuple(stops)),
        GREEDY,
        with_rules(prompts[3], bad_words=tuple(map(tuple, words))),
    ]
    expected = [
        wanted(prompts[0], eos_token_id=None, repetition_penalty=1.8),
        wanted(prompts[1], eos_token_id=stops, min_new_tokens=NEW),
        wanted(prompts[2], eos_token_id=None),
        wanted(prompts[3], eos_token_id=None, bad_words_ids=words),
    ]
    assert generate(runner, prompts, samples)[0] == expected
    assert expected[0] != wanted(prompts[0], eos_token_id=None)
    assert expected[3] != plain


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_penalties_count_what_the_runner_sampled(model: LoadedModel, theirs: Any, temperature: float) -> None:
    """Each token is the one that the definition takes from transformers' logits and the true history.

    The second round is another sequence in the same slot; it must not see the first one's tokens.
    """
    runner, _ = make_runner(model)
    for seed in (1, 2):
        prompt = prompt_of(11, seed)
        fields = {"repetition_penalty": 1.2, "presence_penalty": 1.5, "frequency_penalty": 0.9, "bad_words": ((1, 2),)}
        sample = with_rules(prompt, replace(GREEDY, temperature=temperature, top_p=0.9, seed=5), **fields)
        (tokens,), _ = generate(runner, [prompt], [sample])
        known = list(prompt)
        for token in tokens:
            with torch.inference_mode():
                logits = theirs(torch.tensor([known])).logits[:, -1]
            spec = replace(sample, position=len(known))
            assert token == int(reference.sample(logits, [spec], {0: torch.tensor(known)}, {}).tokens_N[0])
            known.append(token)


def test_a_resumed_sequence_brings_its_history_along(model: LoadedModel) -> None:
    """After preemption prompt and generated tokens are computed again, perhaps in another slot; nothing changes."""
    runner, _ = make_runner(model)
    prompt = prompt_of(7)
    sample = with_rules(prompt, replace(GREEDY, temperature=1.0), presence_penalty=2.0, repetition_penalty=1.4)
    (whole,), _ = generate(runner, [prompt], [sample])
    (part,), _ = generate(runner, [prompt], [sample], count=5)
    again = run(runner, row_of(3, prompt + tuple(part), 0, sample)).tokens[0]
    assert [*part, again] == whole[:6]
    assert run(runner, row_of(3, None, len(prompt) + 5, sample)).tokens[0] == whole[6]


def test_a_history_that_does_not_reach_the_position_is_a_programming_error(model: LoadedModel) -> None:
    runner, _ = make_runner(model)
    sample = with_rules((3, 4, 5), repetition_penalty=2.0)
    row = row_of(0, (3, 4, 5), 0, sample)
    assert row.sample is not None
    with pytest.raises(AssertionError, match="slot 0 samples position 3, its history has 2"):
        runner.launch(StepPlan(0, (replace(row, sample=replace(row.sample, history=(3, 4))),)))
    run(runner, row)
    run(runner, row_of(0, (9,), 0, GREEDY))  # another sequence took the slot and forgot the log
    with pytest.raises(AssertionError, match="its history has 0"):
        runner.launch(StepPlan(0, (row_of(0, None, 1, sample),)))


def test_a_log_grows_and_its_views_stay() -> None:
    log = TokenLog(torch.device("cpu"))
    log.begin(2, (5, 6))
    early = log.known(2)
    for number in range(2 * GROWTH):
        log.extend(2, torch.tensor(number))
    assert log.length(2) == 2 * GROWTH + 2
    assert log.known(2).tolist() == [5, 6, *range(2 * GROWTH)]
    assert early.tolist() == [5, 6]
    log.begin(2, (8,))
    assert log.known(2).tolist() == [8]
    log.forget(2)
    log.forget(2)
    assert (log.length(2), len(log)) == (0, 0)


def check_logprobs(told: Any, logits: Tensor, token: int, top: int) -> None:
    wanted = torch.log_softmax(logits, dim=-1)
    assert told.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
    assert abs(told.rank - 1 - int((wanted > wanted[token]).sum())) <= 1  # neighbours may be as good as equal
    assert len(told.top) == top
    assert [value for _, value in told.top] == pytest.approx(wanted.topk(top).values.tolist(), abs=1e-4)
    assert all(float(wanted[candidate]) == pytest.approx(value, abs=1e-4) for candidate, value in told.top)


def test_logprobs_are_of_the_raw_distribution_whatever_the_rules(model: LoadedModel, theirs: Any) -> None:
    runner, _ = make_runner(model)
    prompts = [prompt_of(n, seed=n) for n in (5, 8, 3, 6)]
    hot = replace(GREEDY, temperature=1.5, top_k=50, seed=9)
    samples = [
        replace(GREEDY, logprobs=0),
        hot,
        replace(with_rules(prompts[2], hot, logit_bias=((77, 100.0),)), logprobs=3),
        replace(hot, logprobs=20),
    ]
    tokens, results = generate(runner, prompts, samples)
    assert set(tokens[2]) == {77}
    for step, result in enumerate(results):
        assert set(result.logprobs) == {0, 2, 3}
        for i, top in ((0, 0), (2, 3), (3, 20)):
            with torch.inference_mode():
                logits = theirs(torch.tensor([[*prompts[i], *tokens[i][:step]]])).logits[0, -1]
            check_logprobs(result.logprobs[i], logits, tokens[i][step], top)
    assert all(result.logprobs[0].rank == 1 for result in results)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_prompt_logprobs_are_those_of_one_pass_however_it_is_cut(model: LoadedModel, theirs: Any, chunk: int) -> None:
    """Two prompts of which one asks, with a third sequence decoding beside them."""
    runner, _ = make_runner(model)
    asking, silent = prompt_of(40, 1), prompt_of(40, 2)
    (beside,) = run(runner, row_of(2, (5, 6, 7), 0, GREEDY)).tokens
    told: list[Any] = []
    first: list[int | None] = []
    for position, start in enumerate(range(0, 40, chunk)):
        end = min(40, start + chunk)
        sample, following = (replace(GREEDY, logprobs=1), None) if end == 40 else (None, asking[end])
        result = run(
            runner,
            row_of(0, silent[start:end], start, sample),
            row_of(1, asking[start:end], start, sample, prompt_logprobs=2, next_token=following),
            row_of(2, None, 3 + position, GREEDY),
        )
        assert set(result.prompt_logprobs) == {1}
        assert len(result.prompt_logprobs[1]) == end - start - (end == 40)
        assert set(result.logprobs) == ({0, 1} if end == 40 else set())
        told.extend(result.prompt_logprobs[1])
        first = list(result.tokens)
    with torch.inference_mode():
        logits = theirs(torch.tensor([asking])).logits[0]
        others = theirs(torch.tensor([silent])).logits[0]
    assert len(told) == 39
    for position, one in enumerate(told):
        check_logprobs(one, logits[position], asking[position + 1], 2)
    assert first[:2] == [int(others[-1].argmax()), int(logits[-1].argmax())]
    assert beside is not None


def poison(kv: list[tuple[Tensor, Tensor]], slot: int) -> None:
    """As a fault in an earlier chunk would have left the sequence's first block."""
    for k, v in kv:
        k[EACH * slot] = v[EACH * slot] = float("nan")


def test_a_row_with_broken_kv_faults_alone_and_its_followers_too(model: LoadedModel) -> None:
    prompts = [prompt_of(n, seed=n) for n in (9, 10, 11)]
    samples = [GREEDY, GREEDY, replace(GREEDY, temperature=1.0)]
    sound, _ = make_runner(model)
    expected, _ = generate(sound, prompts, samples, count=3)
    runner, kv = make_runner(model)
    poison(kv, 1)
    rows = [
        row_of(0, prompts[0], 0, samples[0]),
        row_of(1, prompts[1][4:], 4, GREEDY),
        row_of(2, prompts[2], 0, samples[2]),
    ]
    rows[1] = replace(rows[1], sample=replace(GREEDY, position=10, logprobs=2))
    runner.launch(StepPlan(0, tuple(rows)))
    # Launched before anybody knows: the faulted row has no token to go on from, the others are not touched by that.
    ahead = [row_of(i, None, len(p), s) for i, (p, s) in enumerate(zip(prompts, samples, strict=True))]
    runner.launch(StepPlan(1, tuple(ahead)))
    for step in (0, 1):
        result = runner.collect()
        assert result.faults == {1}
        assert result.tokens == (expected[0][step], None, expected[2][step])
        assert not result.logprobs
    fresh = run(runner, row_of(1, prompts[1], 0, GREEDY))
    assert (fresh.tokens, fresh.faults) == ((expected[1][0],), frozenset())


def test_a_chunk_that_does_not_sample_faults_too(model: LoadedModel) -> None:
    """Otherwise its KV would be handed on and kept as a prefix for others."""
    runner, kv = make_runner(model)
    poison(kv, 1)
    result = run(runner, row_of(0, (3, 4), 0, None), row_of(1, (5, 6, 7), 4, None), row_of(2, (5,), 0, GREEDY))
    assert result.faults == {1}
    assert result.tokens[:2] == (None, None)
    assert result.tokens[2] is not None


def test_a_fault_that_the_last_position_cannot_see_is_found(tmp_path: Path) -> None:
    """With a window of 4 the last of 30 tokens sees nothing of what position 4 took from the broken block."""
    folder = make_tiny_checkpoint(tmp_path / "windowed", "mistral", sliding_window=4)
    runner, kv = make_runner(load_model(folder, dtype="float32"))
    poison(kv, 1)
    for sample in (None, GREEDY):
        result = run(runner, row_of(0, prompt_of(30), 0, sample), row_of(1, prompt_of(30), 4, sample))
        assert result.faults == {1}


def test_prompt_logprobs_of_a_broken_row_are_not_told(model: LoadedModel) -> None:
    runner, kv = make_runner(model)
    poison(kv, 1)
    ask: dict[str, Any] = {"prompt_logprobs": 0, "next_token": 9}
    result = run(runner, row_of(0, (3, 4), 0, None, **ask), row_of(1, (5, 6, 7), 4, None, **ask))
    assert result.faults == {1}
    assert set(result.prompt_logprobs) == {0}


def test_rules_that_leave_no_token_fault_their_row_only(model: LoadedModel) -> None:
    """Also with a history, which goes on counting while a step ahead is on its way."""
    runner, _ = make_runner(model)
    nothing = with_rules((3, 4), allowed_token_ids=(8,), bad_words=((8,),), repetition_penalty=1.5)
    runner.launch(StepPlan(0, (row_of(0, (3, 4), 0, nothing), row_of(1, (3, 4), 0, GREEDY))))
    runner.launch(StepPlan(1, (row_of(0, None, 2, nothing), row_of(1, None, 2, GREEDY))))
    for ruled_out in ({0}, set()):  # the second step has no token to go on from: that is no doing of the rules
        result = runner.collect()
        assert (result.faults, result.ruled_out) == ({0}, ruled_out)
        assert result.tokens[0] is None
        assert result.tokens[1] is not None


def test_a_row_with_broken_numbers_is_never_blamed_on_its_rules(model: LoadedModel) -> None:
    runner, kv = make_runner(model)
    poison(kv, 1)
    nothing = with_rules(tuple(range(7)), allowed_token_ids=(8,), bad_words=((8,),))
    result = run(runner, row_of(0, tuple(range(7)), 0, nothing), row_of(1, (4, 5, 6), 4, nothing))
    assert (result.faults, result.ruled_out) == ({0, 1}, {0})


def test_after_a_failed_step_its_slots_fault_and_histories_do_not_stop_the_runner(model: LoadedModel) -> None:
    runner, _ = make_runner(model)
    sample = with_rules((3, 4), repetition_penalty=1.5)
    run(runner, row_of(0, (3, 4), 0, sample), row_of(2, (7, 8), 0, GREEDY))
    runner.launch(StepPlan(1, (row_of(0, None, 2, sample), row_of(1, (512,), 0, GREEDY))))  # no such token
    runner.launch(StepPlan(2, (row_of(0, None, 3, sample), row_of(2, None, 2, GREEDY))))
    with pytest.raises(EngineFault, match="could not compute"):
        runner.collect()
    result = runner.collect()
    assert result.faults == {0}
    assert result.tokens[1] is not None
