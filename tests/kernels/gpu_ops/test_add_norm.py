"""Residual add and normalisation in one pass, against the definition."""

from __future__ import annotations

import pytest
import torch

from diptych.kernels.ops.add_norm import cuda, launch, reference
from diptych.kernels.ops.parts import Parts
from diptych.kernels.ops.rms_norm import cuda as norm_cuda
from diptych.kernels.ops.rms_norm.reference import rms_norm

SIZES = (1, 15, 16, 64, 100, 576, 1000)


def inputs(
    tokens: int, size: int, count: int, dtype: torch.dtype, place: torch.device
) -> tuple[torch.Tensor, Parts | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * size + count)
    residual = torch.randn(tokens, size, generator=generator).to(dtype).to(place)
    weight = torch.randn(size, generator=generator).to(dtype).to(place)
    parts = torch.randn(count, tokens, size, generator=generator).to(place) if count else None
    return residual, None if parts is None else Parts(parts, count), weight


def check(residual: torch.Tensor, parts: Parts | None, weight: torch.Tensor, tolerance: float) -> None:
    wanted_residual = residual.clone()
    wanted = reference.add_norm(wanted_residual, parts, weight, 1e-5, torch.empty_like(residual))
    out = torch.full_like(residual, float("nan"))
    assert cuda.add_norm(residual, parts, weight, 1e-5, out) is out
    assert torch.equal(residual, wanted_residual)  # sums in the same order, rounded once
    torch.testing.assert_close(out.float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_every_shape_and_number_of_parts_gives_the_definition(
    tokens: int, size: int, count: int, place: torch.device
) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        check(*inputs(tokens, size, count, dtype, place), tolerance)


def test_many_short_rows_share_a_program_and_the_last_one_is_not_full(place: torch.device) -> None:
    check(*inputs(1025, 64, 1, torch.float32, place), 1e-5)


def test_parts_that_lie_token_by_token_are_read_where_they_lie(place: torch.device) -> None:
    """What the experts leave: [T, K, N], seen as K parts."""
    residual, _, weight = inputs(5, 48, 0, torch.float32, place)
    pairs = torch.randn(5, 3, 48, generator=torch.Generator().manual_seed(3)).to(place)
    check(residual, Parts(pairs.transpose(0, 1), 3), weight, 1e-5)


def test_only_as_many_parts_as_are_counted_are_added(place: torch.device) -> None:
    residual, parts, weight = inputs(4, 32, 3, torch.float32, place)
    assert parts is not None
    parts.data[2] = float("nan")
    check(residual, Parts(parts.data, 2), weight, 1e-5)


def test_a_bad_row_spoils_no_other(place: torch.device) -> None:
    residual, parts, weight = inputs(4, 32, 1, torch.float32, place)
    assert parts is not None
    parts.data[0, 1, 5] = float("nan")
    out = cuda.add_norm(residual, parts, weight, 1e-5, torch.empty_like(residual))
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_the_norm_alone_takes_any_shape(place: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, generator=generator).to(place)
    for shape in ((7, 3, 32), (2, 32), (0, 32)):
        x = torch.randn(*shape, generator=generator).to(place)
        torch.testing.assert_close(norm_cuda.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    wide = torch.randn(6, 96, generator=generator).to(place)
    torch.testing.assert_close(norm_cuda.rms_norm(wide[:, 32:64], weight, 1e-6), rms_norm(wide[:, 32:64], weight, 1e-6))


def test_what_does_not_fit_is_refused_with_both_sides() -> None:
    residual, weight = torch.zeros(4, 32), torch.ones(32)
    parts = torch.zeros(2, 4, 32)
    with pytest.raises(ValueError, match=r"\(4, 32\).*\(31,\)"):
        launch.add_norm(residual, None, torch.ones(31), 1e-5, torch.empty(4, 32))
    with pytest.raises(ValueError, match="3 of"):
        launch.add_norm(residual, Parts(parts, 3), weight, 1e-5, torch.empty(4, 32))
    with pytest.raises(ValueError, match="parts for"):
        launch.add_norm(residual, Parts(parts[:, :3], 2), weight, 1e-5, torch.empty(4, 32))
    with pytest.raises(ValueError, match="not contiguous"):
        launch.add_norm(residual, Parts(torch.zeros(1, 32, 4).mT, 1), weight, 1e-5, torch.empty(4, 32))
    with pytest.raises(ValueError, match="float16"):
        launch.add_norm(residual, None, weight, 1e-5, torch.empty(4, 32, dtype=torch.float16))
    out = launch.add_norm(residual, Parts(parts + 1, 2), weight, 1e-5, torch.empty(4, 32))
    assert torch.equal(residual, torch.full((4, 32), 2.0))
    torch.testing.assert_close(out, torch.ones(4, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 513, 8192])
@pytest.mark.parametrize("size", [576, 2048, 4096, 5120, 16384])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_in_bfloat16_the_card_is_as_near_to_float64_as_rounding_allows(
    tokens: int, size: int, count: int, place: torch.device
) -> None:
    residual = torch.randn(tokens, size, device=place, dtype=torch.bfloat16)
    weight = torch.randn(size, device=place, dtype=torch.bfloat16)
    data = torch.randn(max(count, 1), tokens, size, device=place)
    parts = Parts(data, count) if count else None
    wide = (residual.double() + (data.double().sum(0) if count else 0)).to(torch.bfloat16).double()
    out = torch.full_like(residual, float("nan"))
    cuda.add_norm(residual, parts, weight, 1e-5, out)
    assert float((residual.double() - wide).norm() / wide.norm()) < 1e-4  # rounding of a sum may fall to either side
    wide = residual.double()
    wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert float((out.double() - wanted).norm() / wanted.norm()) < 2.5e-3
    assert float(((out.double() - wanted).abs() / wanted.abs().clamp_min(1e-3)).max()) < 5e-3


@pytest.mark.parametrize("size", [64, 1000])
def test_no_bit_of_an_invariant_row_depends_on_the_rows_beside_it(size: int, place: torch.device) -> None:
    residual, parts, weight = inputs(40, size, 2, torch.float16, place)
    assert parts is not None
    for norm in (cuda.add_norm, reference.add_norm):
        whole = residual.clone()
        out = norm(whole, parts, weight, 1e-5, torch.empty_like(whole), invariant=True)
        for begin, end in ((0, 1), (39, 40), (3, 20)):
            some = residual[begin:end].clone()
            some_parts = Parts(parts.data[:, begin:end], 2)
            assert torch.equal(
                norm(some, some_parts, weight, 1e-5, torch.empty_like(some), invariant=True), out[begin:end]
            )
            assert torch.equal(some, whole[begin:end])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [128, 576, 4096])
def test_on_the_card_no_bit_of_an_invariant_row_depends_on_the_rows_beside_it(size: int, place: torch.device) -> None:
    """Row counts on both sides of every change of layout."""
    residual = torch.randn(3000, size, device=place, dtype=torch.bfloat16)
    weight = torch.randn(size, device=place, dtype=torch.bfloat16)
    whole = cuda.add_norm(residual, None, weight, 1e-5, torch.empty_like(residual), invariant=True)
    for begin, end in ((5, 6), (0, 128), (0, 129), (100, 1124), (100, 1125)):
        some = residual[begin:end].clone()
        out = cuda.add_norm(some, None, weight, 1e-5, torch.empty_like(some), invariant=True)
        assert torch.equal(out, whole[begin:end])
