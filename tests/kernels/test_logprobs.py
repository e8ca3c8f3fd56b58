"""Logprobs: values, ranks, and the order of alternatives among equals."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.kernels.ops.logprobs import cpu, launch, reference

BOTH = pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])


def logits_of(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@BOTH
def test_values_ranks_and_alternatives_by_hand(module: ModuleType) -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.3, 0.2]]).log() + 5
    given_rows, given_tokens = torch.tensor([1, 0, 1]), torch.tensor([1, 0, 3])
    one, two, three = module.logprobs(logits, given_rows, given_tokens, 3).rows([3, 0, 1])
    assert one.logprob == pytest.approx(math.log(0.25), abs=1e-6)
    assert one.rank == 2  # its equal is not more likely
    assert [token for token, _ in one.top] == [2, 0, 1]
    assert [math.exp(value) for _, value in one.top] == pytest.approx([0.3, 0.25, 0.25], abs=1e-6)
    assert (two.rank, two.top) == (4, ())
    assert two.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert (three.rank, three.top) == (4, one.top[:1])


@BOTH
def test_equal_ones_come_by_id_also_at_the_edge(module: ModuleType) -> None:
    logits = torch.zeros(1, 600)
    logits[0, [500, 40]] = 1.0
    (told,) = module.logprobs(logits, torch.tensor([0]), torch.tensor([599]), 5).rows([5])
    assert [token for token, _ in told.top] == [40, 500, 0, 1, 2]
    assert told.rank == 3


@BOTH
def test_more_alternatives_than_tokens_are_all_of_them(module: ModuleType) -> None:
    (told,) = module.logprobs(logits_of(1, 4), torch.tensor([0]), torch.tensor([0]), 9).rows([9])
    assert sorted(token for token, _ in told.top) == [0, 1, 2, 3]
    assert sum(math.exp(value) for _, value in told.top) == pytest.approx(1, abs=1e-6)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_the_others_are_not(module: ModuleType, value: float) -> None:
    logits = logits_of(3, 50)
    logits[1, 7] = value
    tokens = torch.tensor([3, 3, 3])
    told = module.logprobs(logits, torch.arange(3), tokens, 2).rows([2, 2, 2])
    assert math.isnan(told[1].logprob)
    clean = module.logprobs(logits_of(3, 50), torch.arange(3), tokens, 2).rows([2, 2, 2])
    assert (told[0], told[2]) == (clean[0], clean[2])


@BOTH
def test_no_row_asked_for_is_no_row(module: ModuleType) -> None:
    none = torch.tensor([], dtype=torch.int64)
    assert module.logprobs(logits_of(2, 5), none, none, 3).rows([]) == []


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 5 * cpu.PIECE),
    most=st.integers(0, 25),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_cpu_equals_the_reference(num: int, most: int, seed: int, dtype: torch.dtype) -> None:
    """To the last bit, though it computes in pieces; bfloat16 has many equal logits."""
    logits = logits_of(num, 300, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, num, (num,), generator=generator)
    tokens = torch.randint(0, 300, (num,), generator=generator)
    one, two = (module.logprobs(logits, rows, tokens, most) for module in (cpu, reference))
    assert torch.equal(one.own_R, two.own_R)
    assert torch.equal(one.ranks_R, two.ranks_R)
    assert torch.equal(one.ids_RK, two.ids_RK)
    assert torch.equal(one.values_RK, two.values_RK)


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(1,\) rows and \(2,\) tokens"):
        launch.logprobs(torch.zeros(2, 5), torch.tensor([0]), torch.tensor([0, 1]), 1)
