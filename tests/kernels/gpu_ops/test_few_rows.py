"""The linear of few rows against float64: however a sum is split, its parts add up."""

from __future__ import annotations

import pytest
import torch

from diptych.kernels.ops.configs import LIBRARY, MEASURED, Config
from diptych.kernels.ops.linear import launch
from diptych.kernels.ops.linear.cuda import OP, WHOLE_OP, DeviceLinear, InvariantLinear, multiply
from diptych.protos.errors import StartupError

SMALL = (
    Config(16, 16, 16, 1, 4, 2),
    Config(16, 32, 32, 2, 4, 2),
    Config(16, 16, 16, 3, 4, 3),
    Config(32, 16, 64, 100, 4, 2),
)
# rows, outs, ins: one off every edge of a tile, one of each, several blocks of rows
SHAPES = ((1, 16, 16), (3, 17, 33), (16, 33, 64), (17, 48, 80), (40, 31, 129), (1, 1, 1), (2, 64, 200))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_parts_add_up_to_the_product(
    shape: tuple[int, int, int], config: Config, dtype: torch.dtype, place: torch.device
) -> None:
    rows, outs, ins = shape
    generator = torch.Generator().manual_seed(rows * outs + ins)
    x, weight, bias = (
        torch.randn(size, generator=generator).to(dtype).to(place) for size in ((rows, ins), (outs, ins), (outs,))
    )
    for given in (None, bias):
        found = multiply(x, weight, given, config)
        assert found.data.shape == (found.count, rows, outs)
        assert 1 <= found.count <= config.split
        assert found.data.dtype is (torch.float32 if found.count > 1 else dtype)
        wanted = x.double() @ weight.double().T + (0 if given is None else given.double())
        tolerance = 2e-3 if found.data.dtype is torch.float16 else 1e-4
        torch.testing.assert_close(found.total().double(), wanted, atol=tolerance * 10, rtol=tolerance)


def test_rows_that_are_slices_of_longer_ones_are_read_where_they_lie(place: torch.device) -> None:
    wide = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(place)
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)).to(place)
    out = torch.full((5, 24), float("nan"), device=place)
    multiply(wide[:, 32:64], weight, None, SMALL[0], out=out)
    torch.testing.assert_close(out, wide[:, 32:64] @ weight.T, atol=1e-4, rtol=1e-4)


def test_what_the_table_gives_to_a_whole_sum_is_never_split() -> None:
    assert all(config.split <= 1 for config in MEASURED[WHOLE_OP].values())
    assert any(config is not LIBRARY for config in MEASURED[OP].values())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 16, 17, 32, 64, 65, 300])
@pytest.mark.parametrize(
    "shape", [(6144, 4096), (4096, 4096), (1001, 4096), (32_001, 2048), (4096, 14336), (960, 576)], ids=str
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_in_bfloat16_is_as_near_to_the_truth_as_cublas(
    rows: int, shape: tuple[int, int], has_bias: bool, place: torch.device
) -> None:
    outs, ins = shape
    generator = torch.Generator(place).manual_seed(rows)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=place, dtype=torch.bfloat16, generator=generator)

    x, weight, bias, residual = random(rows, ins), random(outs, ins) / ins**0.5, random(outs), random(rows, outs)
    layer = DeviceLinear(weight, bias if has_bias else None)
    truth = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    theirs = torch.nn.functional.linear(x, weight, layer.bias)
    allowed = 1.05 * float((theirs.double() - truth).norm()) + 1e-9
    out = torch.full((rows, outs), float("nan"), dtype=torch.bfloat16, device=place)
    assert float((layer(x).double() - truth).norm()) <= allowed
    assert float((layer.write(x, out).double() - truth).norm()) <= allowed
    parts = layer.parts(x)
    if parts is not None:
        assert parts.data.shape == (parts.count, rows, outs)
        assert float((parts.total().to(torch.bfloat16).double() - truth).norm()) <= allowed
    summed = residual.clone()
    layer.into(x, summed)
    apart = residual + theirs
    both = truth + residual.double()
    allowed = 1.2 * float((apart.double() - both).norm()) + 1e-9
    assert float((summed.double() - both).norm()) <= allowed
    assert float((layer.add(x, residual).double() - both).norm()) <= allowed


@pytest.mark.parametrize("rows", [1, 64, 128, 129, 4000])
def test_an_odd_number_of_outputs_never_goes_to_the_library(rows: int) -> None:
    """Its rows begin where 16 bytes cannot be stored at once: a vocabulary of 32,001."""
    x = torch.empty(rows, 64, dtype=torch.bfloat16)
    odd, even = (DeviceLinear(torch.empty(outs, 64, dtype=torch.bfloat16), None) for outs in (32_001, 32_008))
    assert odd._config(WHOLE_OP, x) is not LIBRARY
    assert odd._config(WHOLE_OP, x).split == 1
    if rows > 128:
        assert even._config(WHOLE_OP, x) is LIBRARY


@pytest.mark.gpu
@pytest.mark.parametrize("op", [OP, WHOLE_OP])
def test_every_measured_configuration_computes_its_shape_rightly(op: str, place: torch.device) -> None:
    """Some tile sizes are compiled wrongly: each must be proved on the card, for every number of rows it serves."""
    for (rows, outs, ins), config in MEASURED[op].items():
        if config is LIBRARY:
            continue
        x = torch.randn(rows, ins, device=place, dtype=torch.bfloat16)
        weight = torch.randn(outs, ins, device=place, dtype=torch.bfloat16)
        found = multiply(x, weight, None, config)
        wanted = torch.cat([x.double() @ piece.double().T for piece in weight.split(16_384)], 1)
        error = float((found.total().double() - wanted).norm() / wanted.norm())
        assert error < (1e-5 if found.count > 1 else 2.5e-3), (op, rows, outs, ins)


@pytest.mark.gpu
def test_a_captured_layer_computes_what_it_does_outside(place: torch.device) -> None:
    x = torch.randn(16, 4096, device=place, dtype=torch.bfloat16)
    layer = DeviceLinear(torch.randn(4096, 4096, device=place, dtype=torch.bfloat16), None)
    alone = layer.parts(x)
    assert alone is not None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.parts(x)
    assert captured is not None
    captured.data.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured.data, alone.data)


def test_a_cpu_has_no_linear_that_no_batch_changes() -> None:
    with pytest.raises(StartupError, match="'cpu'"):
        launch.pack_invariant(torch.zeros(4, 4), None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_no_bit_of_a_row_depends_on_the_rows_beside_it(dtype: torch.dtype, has_bias: bool, place: torch.device) -> None:
    outs, ins = 1001, 1500
    x, weight, bias = (torch.randn(size, device=place, dtype=dtype) for size in ((1100, ins), (outs, ins), (outs,)))
    layer = launch.pack_invariant(weight, bias if has_bias else None)
    assert isinstance(layer, InvariantLinear)
    whole = layer(x)
    truth = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    assert float((whole.double() - truth).norm() / truth.norm()) < (2.5e-3 if dtype is torch.bfloat16 else 1e-6)
    residual = torch.randn(1100, outs, device=place, dtype=dtype)
    for begin, end in ((0, 1), (7, 8), (3, 67), (64, 128), (100, 357), (500, 1100), (5, 5)):
        rows = x[begin:end]
        assert torch.equal(layer(rows), whole[begin:end])
        assert layer.parts(rows) is None
        summed = residual[begin:end].clone()
        layer.into(rows, summed)
        assert torch.equal(summed, residual[begin:end] + whole[begin:end])
        assert torch.equal(layer.add(rows, residual[begin:end]), residual[begin:end] + whole[begin:end])
