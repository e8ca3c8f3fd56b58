"""The rotation of heads as its own kernel equals its definition, wherever the heads lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.kernels.ops.rotate import cuda, reference

# tokens, heads, head size: halves that are no powers of two, more heads than a program has
SHAPES = ((1, 1, 2), (3, 5, 16), (7, 9, 80), (2, 4, 128), (2, 33, 96))


def angles(tokens: int, dim: int, dtype: torch.dtype, place: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    cos, sin = (torch.randn(tokens, dim, generator=generator).to(dtype).to(place) for _ in "cs")
    return cos, sin


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_heads_are_turned_as_defined(shape: tuple[int, int, int], dtype: torch.dtype, place: torch.device) -> None:
    tokens, heads, dim = shape
    rows = torch.randn(tokens, heads * dim + 6, generator=torch.Generator().manual_seed(dim)).to(dtype).to(place)
    x_THD = rows[:, 4:-2].view(tokens, heads, dim)
    wanted, around = x_THD.clone(), rows.clone()
    cos, sin = angles(tokens, dim, dtype, place)
    reference.rotate(wanted, cos, sin)
    cuda.rotate(x_THD, cos, sin)
    torch.testing.assert_close(x_THD, wanted, atol=1e-6 if dtype is torch.float32 else 2e-2, rtol=1e-2)
    assert torch.equal(rows[:, :4], around[:, :4])
    assert torch.equal(rows[:, -2:], around[:, -2:])


def test_heads_before_tokens_are_turned_too(place: torch.device) -> None:
    x_HTD = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).to(place)
    wanted = x_HTD.transpose(0, 1).clone()
    cos, sin = angles(5, 8, torch.float32, place)
    reference.rotate(wanted, cos, sin)
    cuda.rotate(x_HTD.transpose(0, 1), cos, sin)
    torch.testing.assert_close(x_HTD.transpose(0, 1), wanted)
