"""Logprobs without a sort, against the definition: in the interpreter and on a card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.kernels.device.testing import nothing_waits
from diptych.kernels.ops.logprobs import cuda, reference
from diptych.kernels.ops.logprobs.columns import Logprobs

INF, NAN = float("inf"), float("nan")


def logits_of(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def check(
    logits: Tensor, rows: list[int], tokens: list[int], most: int, place: torch.device, tile: int = 512
) -> Logprobs:
    """Values to a few roundings, ranks, and alternatives in order: equal ones by id. The definition adds up in float32:
    of 150,000 tokens that alone is off by more than the kernel is.
    """
    asked = torch.tensor(rows), torch.tensor(tokens)
    found = cuda.logprobs(logits.to(place), *(one.to(place) for one in asked), most, tile=tile)
    wanted = reference.logprobs(logits, *asked, most)
    is_number = ~wanted.own_R.isnan()
    exact_RV = torch.log_softmax(logits[asked[0]].double(), dim=-1).float()
    own_R, values_RK = exact_RV.gather(1, asked[1][:, None])[:, 0], exact_RV.gather(1, wanted.ids_RK)
    torch.testing.assert_close(found.own_R.cpu(), own_R, atol=2e-6, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.values_RK.cpu(), values_RK, atol=2e-6, rtol=1e-6, equal_nan=True)
    assert torch.equal(found.ranks_R.cpu(), wanted.ranks_R)
    assert torch.equal(found.ids_RK.cpu()[is_number], wanted.ids_RK[is_number])
    assert found.ids_RK.dtype is torch.int64
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", [1, 97, 511, 1003, 32_001])
def test_values_ranks_and_alternatives_are_the_definitions(vocab: int, dtype: torch.dtype, place: torch.device) -> None:
    logits = logits_of(3, vocab).to(dtype)
    tokens = [vocab - 1, int(logits[0].argmax()), 0]
    check(logits, [2, 0, 2], tokens, 5, place, tile=512 if vocab < 2000 else 8192)


def test_equal_logits_come_by_id_in_a_tile_and_across_tiles(place: torch.device) -> None:
    logits = logits_of(2, 1003).round()
    logits[1] = 0.5
    logits[1, [3, 700]] = 2.0
    found = check(logits, [0, 1, 1], [8, 8, 700], 20, place)
    assert found.ids_RK[1].tolist() == [3, 700, 0, 1, 2, *range(4, 19)]
    assert found.ranks_R.tolist()[1:] == [3, 1]


def test_rows_that_are_no_numbers_are_nan_throughout_and_alone(place: torch.device) -> None:
    logits = logits_of(5, 600)
    logits[0, 599], logits[1, 3], logits[2], logits[3, 1:] = NAN, INF, -INF, -INF
    found = check(logits, [0, 1, 2, 3, 4, 3], [5, 3, 5, 0, 5, 9], 3, place)
    assert found.own_R.isnan().tolist() == [True] * 3 + [False] * 3
    assert found.values_RK.isnan().all(dim=1).tolist() == [True] * 3 + [False] * 3
    assert (found.own_R[3], found.own_R[5]) == (0.0, -INF)
    assert found.ranks_R.tolist()[:4] == [1, 1, 1, 1]


@pytest.mark.parametrize("most", [0, 1, 32, 33, 900])
def test_any_number_of_alternatives(most: int, place: torch.device) -> None:
    """More than a kernel keeps are sorted, and more than there are tokens are all."""
    found = check(logits_of(2, 700), [1, 0], [4, 2], most, place)
    assert found.ids_RK.shape == (2, min(most, 700))


def test_no_row_is_no_launch(place: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=place)
    found = cuda.logprobs(logits_of(2, 50).to(place), none, none, 3)
    assert found.rows([]) == []


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128_256, 151_936])
def test_a_card_tells_what_the_definition_tells_without_being_asked(vocab: int, place: torch.device) -> None:
    """bfloat16, whose logits tie by the hundred."""
    logits = logits_of(64, vocab).bfloat16()
    rows = torch.randperm(64)
    tokens = torch.randint(0, vocab, (64,))
    check(logits, rows.tolist(), tokens.tolist(), 20, place, tile=4096)
    on_card = logits.to(place), rows.to(place), tokens.to(place)
    torch.cuda.synchronize()
    with nothing_waits():
        cuda.logprobs(*on_card, 20)
        cuda.logprobs(*on_card, 40)
