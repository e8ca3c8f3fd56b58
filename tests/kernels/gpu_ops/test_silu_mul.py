"""silu(gate) * up, against the definition."""

from __future__ import annotations

import pytest
import torch

from diptych.kernels.ops.parts import Parts
from diptych.kernels.ops.silu_mul import cuda, launch, reference


@pytest.mark.parametrize("tokens", [0, 1, 3, 66])
@pytest.mark.parametrize("size", [1, 16, 100, 1030])
def test_every_shape_gives_the_definition(tokens: int, size: int, place: torch.device) -> None:
    generator = torch.Generator().manual_seed(tokens * size)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        x = (torch.randn(tokens, 2 * size, generator=generator) * 4).to(dtype).to(place)
        out = torch.full((tokens, size), float("nan"), dtype=dtype, device=place)
        wanted = reference.silu_mul(x, torch.empty_like(out))
        assert cuda.silu_mul(x, out) is out
        torch.testing.assert_close(out.float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_are_added_before_the_gate(count: int, place: torch.device) -> None:
    generator = torch.Generator().manual_seed(count)
    parts = Parts(torch.randn(count + 1, 3, 2 * 40, generator=generator).to(place), count)
    parts.data[count] = float("nan")  # not counted
    out = torch.empty(3, 40, dtype=torch.float16, device=place)
    cuda.silu_mul(parts, out)
    wanted = reference.silu_mul(parts, torch.empty(3, 40, dtype=torch.float16, device=place))
    torch.testing.assert_close(out, wanted, atol=2e-3, rtol=2e-3)


def test_gates_far_from_zero_neither_overflow_nor_make_nan(place: torch.device) -> None:
    gates = torch.tensor([[-3e4, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 3e4]])
    out = cuda.silu_mul(torch.cat([gates, torch.ones_like(gates)], 1).to(place), torch.empty(1, 8, device=place))
    torch.testing.assert_close(out.cpu(), torch.nn.functional.silu(gates))


def test_what_does_not_fit_is_refused_with_both_sides() -> None:
    with pytest.raises(ValueError, match=r"\(4, 33\).*\(4, 16\)"):
        launch.silu_mul(torch.zeros(4, 33), torch.empty(4, 16))
    with pytest.raises(ValueError, match="3 of 2"):
        launch.silu_mul(Parts(torch.zeros(2, 4, 32), 3), torch.empty(4, 16))
    with pytest.raises(ValueError, match="contiguous"):
        launch.silu_mul(torch.zeros(32, 4).T, torch.empty(4, 16))
    assert not launch.silu_mul(torch.zeros(4, 32), torch.empty(4, 16)).any()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 65, 8192])
@pytest.mark.parametrize("size", [768, 1536, 14336])
def test_in_bfloat16_the_card_is_as_near_to_float64_as_rounding_allows(
    tokens: int, size: int, place: torch.device
) -> None:
    x = torch.randn(tokens, 2 * size, device=place, dtype=torch.bfloat16) * 3
    out = torch.full((tokens, size), float("nan"), dtype=torch.bfloat16, device=place)
    cuda.silu_mul(x, out)
    gate, up = x.double().chunk(2, -1)
    wanted = gate * torch.sigmoid(gate) * up
    assert float((out.double() - wanted).norm() / wanted.norm()) < 2.5e-3
    assert bool(((out.double() - wanted).abs() <= 5e-3 * wanted.abs() + 1e-6).all())
