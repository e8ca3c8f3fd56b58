"""Rules on logits: each field means what transformers' processor of that name, or OpenAI's formula, says it means."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.kernels.ops.sampling import cpu, launch, reference
from diptych.protos.step import LogitRules, SampleSpec

BOTH = pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
VOCAB = 400
INF = float("inf")


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def history_of(length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """With many repetitions."""
    rng = random.Random(seed)
    return torch.tensor([rng.randrange(vocab) if rng.random() < 0.5 else rng.randrange(9) for _ in range(length)])


def ruled(logits: Tensor, module: ModuleType, history: Tensor, num_prompt: int = 5, **fields: Any) -> Tensor:
    rules = LogitRules(num_prompt=num_prompt, **fields)
    spec = SampleSpec(0.0, 1.0, 0, 0, len(history), rules=rules)
    changed: Tensor = module.apply_rules(logits, spec, history if rules.needs_history else None)
    return changed


@BOTH
@pytest.mark.parametrize("penalty", [1.3, 0.7, 2.0])
def test_repetition_penalty_is_that_of_transformers(module: ModuleType, penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    for seed in range(5):
        logits, history = logits_of(1, seed), history_of(60, seed)
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(history[None], logits)[0]
        assert torch.equal(ruled(logits[0], module, history, repetition_penalty=penalty), wanted)


@BOTH
def test_bad_words_are_those_of_transformers(module: ModuleType) -> None:
    """Words of several tokens, alike in part, some longer than the sequence, some that end in the prompt."""
    from transformers import NoBadWordsLogitsProcessor

    words = ((3,), (7, 8), (1, 2, 9), (2, 10), (1, 2, 3, 4, 5, 6, 11), (2, 2), (8, 399))
    for tokens in ([1, 2], [2], [1, 1, 2], [7], [8, 7], [1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [50]):
        logits, history = logits_of(1), torch.tensor(tokens)
        # Before 5.23 transformers overlooked a word that the next token would complete at the very beginning.
        told = tuple(word for word in words if len(word) != len(tokens) + 1)
        wanted = NoBadWordsLogitsProcessor([list(word) for word in told])(history[None], logits)[0]
        for num_prompt in (1, len(tokens)):
            assert torch.equal(ruled(logits[0], module, history, num_prompt, bad_words=told), wanted)
    assert not torch.equal(wanted, logits[0])


@BOTH
def test_min_tokens_is_min_new_tokens_of_transformers(module: ModuleType) -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    logits = logits_of(1)
    masked = []
    for length in range(5, 10):
        history = history_of(length)
        wanted = MinNewTokensLengthLogitsProcessor(5, 3, [2, 7])(history[None], logits)[0]
        changed = ruled(logits[0], module, history, 5, min_tokens=3, stop_token_ids=(2, 7))
        assert torch.equal(changed, wanted)
        masked.append(bool(changed[7] == -INF))
    assert masked == [True, True, True, False, False]


@BOTH
def test_presence_and_frequency_follow_openais_formula(module: ModuleType) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counted in what was generated."""
    logits, history = logits_of(1)[0], history_of(80)
    for frequency, presence in ((0.5, 0.0), (0.0, 1.25), (0.3, 0.7), (-0.4, -1.0)):
        changed = ruled(logits, module, history, 30, frequency_penalty=frequency, presence_penalty=presence)
        for token in range(VOCAB):
            count = history[30:].tolist().count(token)
            wanted = float(logits[token]) - count * frequency - (count > 0) * presence
            assert float(changed[token]) == pytest.approx(wanted, abs=1e-5)
        only_prompt = ruled(logits, module, history, 80, frequency_penalty=frequency, presence_penalty=presence)
        assert torch.equal(only_prompt, logits)


@BOTH
def test_allowed_tokens_and_bias(module: ModuleType) -> None:
    logits = logits_of(1)[0]
    changed = ruled(logits, module, history_of(5), allowed_token_ids=(3, 9, 399))
    assert changed.isfinite().nonzero()[:, 0].tolist() == [3, 9, 399]
    assert torch.equal(changed[[3, 9, 399]], logits[[3, 9, 399]])
    changed = ruled(logits, module, history_of(5), logit_bias=((0, -100.0), (4, 2.5)))
    assert changed[4] == logits[4] + 2.5
    assert changed[0] == logits[0] - 100
    assert torch.equal(changed[5:], logits[5:])


@BOTH
def test_the_order_of_rules(module: ModuleType) -> None:
    """A bias lifts no token that is not allowed; the penalty divides the biased logit; what is banned stays banned."""
    logits = torch.zeros(VOCAB)
    history = torch.tensor([4, 5, 4])
    changed = ruled(
        logits,
        module,
        history,
        1,
        allowed_token_ids=(4, 5, 6),
        logit_bias=((4, 8.0), (5, 50.0), (9, 100.0)),
        bad_words=((5,),),
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    assert changed[4] == 8 / 2 - 0.5 - 0.25
    assert changed[[5, 9]].tolist() == [-INF, -INF]
    assert changed[6] == 0


@BOTH
def test_ids_outside_of_the_vocabulary_have_no_effect(module: ModuleType) -> None:
    logits, history = logits_of(1)[0], history_of(6)
    fields: dict[str, Any] = {
        "logit_bias": ((-1, 50.0), (VOCAB, 50.0)),
        "bad_words": ((), (VOCAB,), (-1,), (int(history[-1]), VOCAB)),
        "min_tokens": 9,
        "stop_token_ids": (VOCAB + 7, -3),
    }
    assert torch.equal(ruled(logits, module, history, **fields), logits)
    changed = ruled(logits, module, history, allowed_token_ids=(-1, 5, VOCAB))
    assert changed.isfinite().nonzero()[:, 0].tolist() == [5]


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_whose_rules_leave_nothing_gets_no_token_and_the_others_theirs(
    module: ModuleType, temperature: float
) -> None:
    nothing = LogitRules(num_prompt=4, allowed_token_ids=(7, 8), bad_words=((7,),), min_tokens=1, stop_token_ids=(8,))
    specs = [SampleSpec(temperature, 1.0, 0, 1, 4, rules=rules) for rules in (None, nothing, None)]
    chosen = module.sample(logits_of(3), specs, {}, {})
    plain = module.sample(logits_of(3), [specs[0]] * 3, {}, {})
    assert chosen.sound_N.tolist() == [True, False, True]
    assert chosen.ruled_out_N.tolist() == [False, True, False]
    assert chosen.tokens_N.tolist() == [int(plain.tokens_N[0]), 0, int(plain.tokens_N[2])]


@BOTH
def test_numbers_that_a_mask_would_hide_are_found(module: ModuleType) -> None:
    logits = logits_of(1)
    logits[0, 50] = float("nan")
    spec = SampleSpec(0.0, 1.0, 0, 1, 4, rules=LogitRules(num_prompt=4, allowed_token_ids=(7, 8)))
    chosen = module.sample(logits, [spec], {}, {})
    assert chosen.sound_N.tolist() == [False]
    assert chosen.ruled_out_N.tolist() == [False], "the numbers are to blame, not the rules"


@BOTH
def test_logits_are_left_as_they_were(module: ModuleType) -> None:
    """Logprobs are taken of them."""
    logits, history = logits_of(2), history_of(20)
    before = logits.clone()
    rules = LogitRules(
        num_prompt=2, repetition_penalty=1.5, presence_penalty=1.0, logit_bias=((3, 9.0),), allowed_token_ids=(3, 4)
    )
    module.sample(
        logits, [SampleSpec(t, 0.9, 5, 1, 20, 0.1, rules=rules) for t in (0.0, 1.0)], {0: history, 1: history}, {}
    )
    assert torch.equal(logits, before)


def test_a_missing_or_short_history_is_refused() -> None:
    spec = SampleSpec(0.0, 1.0, 0, 0, 6, rules=LogitRules(num_prompt=2, repetition_penalty=1.5))
    with pytest.raises(ValueError, match="row 1 needs the 6 tokens before it and has 0"):
        launch.sample(logits_of(2), [spec, spec], {0: history_of(6)})
    with pytest.raises(ValueError, match="row 0 needs the 6 tokens before it and has 5"):
        launch.sample(logits_of(1), [spec], {0: history_of(5)})


ids = st.integers(0, VOCAB - 1)
small = st.integers(0, 8)  # these fill the histories
RULES = st.builds(
    LogitRules,
    num_prompt=st.integers(1, 12),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.9, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.35, -0.2]),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=4).map(lambda d: tuple(sorted(d.items()))),
    bad_words=st.lists(st.lists(small, min_size=1, max_size=3).map(tuple), max_size=8).map(tuple),
    allowed_token_ids=st.none() | st.none() | st.lists(ids, max_size=30, unique=True).map(lambda i: tuple(sorted(i))),
    min_tokens=st.integers(0, 20),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
)
SPECS = st.builds(
    SampleSpec,
    temperature=st.sampled_from([0.0, 0.0, 0.6, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 0, 3, 40]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(12, 40),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
    rules=st.none() | RULES,
)


@settings(max_examples=150, deadline=None)
@given(specs=st.lists(SPECS, min_size=1, max_size=6), seed=st.integers(0, 50), rounded=st.booleans(), data=st.randoms())
def test_cpu_equals_the_reference_and_no_row_depends_on_its_company(
    specs: list[SampleSpec], seed: int, rounded: bool, data: random.Random
) -> None:
    logits = logits_of(len(specs), seed)
    if rounded:
        logits = logits.round().bfloat16()
    all_histories = {row: history_of(spec.position, seed + row) for row, spec in enumerate(specs)}
    histories = {row: all_histories[row] for row, spec in enumerate(specs) if spec.rules and spec.rules.needs_history}
    for row, spec in enumerate(specs):
        changed = [m.apply_rules(logits[row].float(), spec, histories.get(row)) for m in (cpu, reference)]
        assert torch.equal(*changed)
    wanted = reference.sample(logits, specs, histories, {})
    order = list(range(len(specs)))
    data.shuffle(order)
    order = order[: data.randint(1, len(order))]
    moved = {place: histories[row] for place, row in enumerate(order) if row in histories}
    chosen = launch.sample(logits[order], [specs[row] for row in order], moved)
    assert chosen.sound_N.tolist() == wanted.sound_N[order].tolist()
    assert chosen.ruled_out_N.tolist() == wanted.ruled_out_N[order].tolist()
    assert chosen.tokens_N.tolist() == wanted.tokens_N[order].tolist()
