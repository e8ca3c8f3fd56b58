"""The linears with something fused into them, against their definition."""

from __future__ import annotations

import pytest
import torch

from diptych.kernels.layers.packed import SharedEmbedding, pack_linears
from diptych.kernels.native import build
from diptych.kernels.ops.linear import launch, reference
from diptych.kernels.ops.linear.cpu import BlockedLinear, PlainLinear, has_blocked_layout

needs_blocks = pytest.mark.skipif(not has_blocked_layout(), reason="no oneDNN for bfloat16 here")
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


def random_weight(outs: int, ins: int) -> torch.Tensor:
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(outs * ins)).bfloat16()


@needs_blocks
@pytest.mark.parametrize("outs", [1, 15, 16, 17, 48, 49, 64, 65, 96, 130, 192, 1537])
@pytest.mark.parametrize("ins", [1, 2, 3, 8, 31, 32, 33, 62, 64, 100, 577])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_row_gives_the_definition_for_every_shape_and_operation(outs: int, ins: int, has_bias: bool) -> None:
    weight = random_weight(outs, ins)
    bias = random_weight(1, outs)[0] if has_bias else None
    ours, defined = launch.pack(weight, bias), reference.pack(weight.float(), None if bias is None else bias.float())
    assert isinstance(ours, BlockedLinear)
    if ins % 2:
        assert not ours._native
    elif build.has_linear() and ins >= 32 and outs >= 64:
        assert ours._native, "the path under test is native code"
    x = torch.cat((random_weight(1, ins), random_weight(3, ins)))
    other = random_weight(2, outs)[1:]
    wide = torch.stack((other[0], other[0]), dim=1)[None, :, 0]
    for row in (x[:1], torch.stack((x[0], x[0]), dim=1)[None, :, 0], x[0], x[None, :1]):
        for beside in (other, wide):
            beside = beside.reshape(*row.shape[:-1], outs) if row.dim() != 2 else beside
            pairs = (
                (ours(row), defined(row.float())),
                (ours.silu(row), defined.silu(row.float())),
                (ours.add(row, beside), defined.add(row.float(), beside.float())),
                (ours.mul(row, beside), defined.mul(row.float(), beside.float())),
            )
            for out, wanted in pairs:
                assert out.shape == wanted.shape
                assert out.dtype is torch.bfloat16
                torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=1e-2 * ins**0.5)


@needs_blocks
def test_a_weight_of_one_number_or_with_nan_is_read_as_it_is() -> None:
    """The layout is found by looking at the memory: where several fit, all must give the same."""
    for outs in (16, 48, 64, 80, 192):
        for number in (0.0, 1.0, -0.5):
            packed = launch.pack(torch.full((outs, 64), number).bfloat16(), None)
            assert torch.equal(packed(torch.ones(1, 64).bfloat16()), torch.full((1, outs), 64 * number).bfloat16())
            assert packed.rows(torch.arange(outs)).eq(number).all()  # type: ignore[union-attr]
        weight = random_weight(outs, 64)
        weight[5, 3], weight[7, 9] = float("nan"), float("inf")
        out = launch.pack(weight, None)(torch.ones(1, 64).bfloat16())[0]
        assert out[5].isnan()
        assert out[7].isinf()
        assert out.isfinite().sum() == outs - 2


@needs_blocks
def test_what_does_not_fit_is_refused() -> None:
    """Native code and oneDNN would read beyond the end of what is too short."""
    packed = launch.pack(random_weight(64, 32), None)
    x = torch.ones(1, 32).bfloat16()
    for wrong in (torch.ones(1, 33).bfloat16(), torch.ones(1, 32), torch.ones(32, 1).bfloat16()):
        with pytest.raises(RuntimeError):
            packed(wrong)
    for rows, wrong in (
        (1, torch.ones(1, 63).bfloat16()),
        (1, torch.ones(1, 64)),
        (2, torch.ones(1, 64).bfloat16()),
        (1, torch.ones(2, 64).bfloat16()),
    ):
        for operation in (packed.add, packed.mul):
            with pytest.raises(RuntimeError):
                operation(x.repeat(rows, 1), wrong)


def test_a_bias_of_another_type_stays_torchs() -> None:
    assert isinstance(launch.pack(random_weight(64, 32), torch.ones(64)), PlainLinear)


@needs_blocks
def test_nothing_packed_lies_in_the_memory_that_it_came_from() -> None:
    """Such memory may be a mapped file, all of which one bias would keep."""
    weight, bias = random_weight(64, 32), torch.ones(64).bfloat16()
    packed = launch.pack(weight, bias)
    wanted = packed(torch.ones(1, 32).bfloat16())
    weight.fill_(9), bias.fill_(9)
    assert torch.equal(packed(torch.ones(1, 32).bfloat16()), wanted)


class Tied(torch.nn.Module):
    def __init__(self, outs: int, ins: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(outs, ins)
        self.head = torch.nn.Linear(ins, outs, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype).requires_grad_(False)


@needs_blocks
@pytest.mark.parametrize(("outs", "ins"), [(512, 64), (130, 62), (1, 2), (1600, 34), (64, 100)])
def test_an_embedding_that_shares_the_heads_memory_gives_every_row_in_every_shape(outs: int, ins: int) -> None:
    model = Tied(outs, ins, torch.bfloat16)
    weight, ids = model.embed.weight.clone(), torch.randperm(outs)
    assert pack_linears(model)
    if not isinstance(model.embed, SharedEmbedding):
        assert outs < 16 or ins % 2, "the path under test is taken"
    for shape in ((outs,), (1, outs), (outs, 1)):
        assert torch.equal(model.embed(ids.view(shape)), weight[ids.view(shape)])
    assert model.embed(ids[:0]).shape == (0, ins)
    for wrong in (-1, outs, 1 << 40):
        with pytest.raises(IndexError):
            model.embed(torch.tensor([0, wrong]))


def test_an_embedding_in_float32_shares_the_weight_as_it_is() -> None:
    model = Tied(64, 32, torch.float32)
    assert not pack_linears(model), "the weights lie where they lay"
    assert type(model.embed) is torch.nn.Embedding
    assert model.embed.weight.data_ptr() in model.head.op.memory()  # type: ignore[operator, union-attr]
