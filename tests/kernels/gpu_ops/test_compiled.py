"""What is launched a second time is the kernel of these very arguments: their types, alignment and special values."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from diptych.kernels.ops.compiled import launch


@triton.jit(do_not_specialize=["size"])
def scaled(x, out, size, factor, addend, BLOCK: tl.constexpr, TWICE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < size, other=0.0) * factor + addend
    if TWICE:
        y = y * 2
    tl.store(out + at, y, mask=at < size)


def check(x: torch.Tensor, factor: int, *, twice: bool = False, size: int | None = None, warps: int = 4) -> None:
    size = x.numel() if size is None else size
    out = torch.full_like(x, 7)
    grid = (-(-size // 16), 1, 1)
    launch(scaled, grid, (x, out, size, factor, 0.5), num_warps=warps, num_stages=1, BLOCK=16, TWICE=twice)
    wanted = (x.float() * factor + 0.5) * (2 if twice else 1)
    torch.testing.assert_close(out[:size].float(), wanted[:size], atol=1e-2, rtol=1e-2)
    assert (out[size:] == 7).all()


def test_each_variant_of_a_kernel_is_told_apart(place: torch.device) -> None:
    """In turn, so that each finds the others' variants remembered."""
    for _ in range(2):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype).to(place)
            for factor in (1, 16, 3, -1, 0, 17, 32):
                check(x, factor)
            check(x, 3, twice=True)
            check(x, 3, warps=2)
            for size in (1, 16, 17, 40):
                check(x, 3, size=size)


def test_tensors_that_begin_at_any_address_are_read_rightly(place: torch.device) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(place)
    for begin in (0, 1, 4, 5, 0, 2):
        check(x[begin : begin + 32], 3)


def test_an_empty_grid_launches_nothing(place: torch.device) -> None:
    check(torch.empty(0, device=place), 3)


@pytest.mark.gpu
def test_a_launch_goes_to_the_stream_that_is_current(place: torch.device) -> None:
    """A captured launch runs at replay, not before: also where the kernel was remembered on another stream."""
    x, out = torch.ones(16, device=place), torch.zeros(16, device=place)

    def run() -> None:
        launch(scaled, (1, 1, 1), (x, out, 16, 3, 0.5), num_warps=4, num_stages=1, BLOCK=16, TWICE=False)

    run()
    run()
    out.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    assert not out.any()
    graph.replay()
    assert (out == 3.5).all()
