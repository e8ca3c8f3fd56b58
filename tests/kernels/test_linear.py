"""The linears with something fused into them, against their definition."""

from __future__ import annotations

import pytest
import torch

from diptych.kernels.ops.linear import launch, reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_what_is_fused_into_a_linear_computes_what_it_would_beside_it(
    dtype: torch.dtype, rows: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, other = random(rows, 48), random(32, 48) / 7, random(rows, 32)
    bias = random(32) if has_bias else None
    packed, defined_by = launch.pack(weight, bias), reference.pack(weight, bias)
    given = x.clone(), other.clone()
    pairs = [
        (packed(x), defined_by(x)),
        (packed.add(x, other), defined_by.add(x, other)),
        (packed.silu(x), defined_by.silu(x)),
        (packed.mul(x, other), defined_by.mul(x, other)),
    ]
    for ours, defined in pairs:
        assert ours.shape == (rows, 32)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), defined.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(x, given[0])
    assert torch.equal(other, given[1])
