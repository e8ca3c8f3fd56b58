"""rms_norm: the CPU's way by layer_norm against the definition."""

from __future__ import annotations

import pytest
import torch

from diptych.kernels.ops.rms_norm import cpu, launch, reference
from diptych.kernels.ops.table import IMPLEMENTATIONS


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 200])
@pytest.mark.parametrize("shape", [(64,), (3, 16), (1,)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_every_number_of_rows_and_magnitude_gives_the_definition(
    rows: int, shape: tuple[int, ...], scale: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn((rows, *shape), generator=generator) * scale + 0.5 * scale
    weight = torch.randn(shape[-1], generator=generator)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        given, factors = x.to(dtype), weight.to(dtype)
        wanted = reference.rms_norm(given, factors, 1e-5)
        for norm in (cpu.rms_norm, launch.rms_norm):
            out = norm(given, factors, 1e-5)
            assert out.dtype is dtype
            torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)


def test_a_row_of_zeros_stays_zero_and_a_bad_row_spoils_no_other() -> None:
    x = torch.randn(5, 32)
    x[1], x[3, 7] = 0, float("nan")
    out = cpu.rms_norm(x, torch.ones(32), 1e-6)
    assert not out[1].any()
    assert out[3].isnan().all()
    torch.testing.assert_close(out[[0, 2, 4]], reference.rms_norm(x[[0, 2, 4]], torch.ones(32), 1e-6))


def test_the_op_is_in_the_table_of_every_device() -> None:
    assert all("rms_norm" in row for row in IMPLEMENTATIONS.values())
