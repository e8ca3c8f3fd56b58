"""Norm, rotation and storing of keys and values in one pass, against the definition and against transformers' form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diptych.kernels.device.step import KV_NOT_FINITE
from diptych.kernels.ops.paged_attention.testing import PagedStep, paged_step
from diptych.kernels.ops.parts import Parts
from diptych.kernels.ops.qk_write import cuda, launch, reference
from diptych.kernels.ops.qk_write.rope import RopeTable

ROWS = [(37, 1), (0, 1), (5, 9), (8, 4)]
FEW = [(37, 1), (5, 2)]  # tokens 0, 1 and 2


def angles(head_dim: int, place: torch.device, context: int = 128) -> RopeTable:
    angle = torch.arange(context, device=place)[:, None] / 10 ** (torch.arange(head_dim // 2, device=place) / 7)
    return RopeTable(angle.cos(), angle.sin())


def weights(head_dim: int, like: Tensor) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(head_dim, generator=generator).to(like) for _ in range(2))
    return q, k, 1e-5


def twice(made: PagedStep) -> tuple[PagedStep, PagedStep]:
    """The step with empty blocks, two times."""
    one, two = (
        PagedStep(
            made.qkv_TN.clone(),
            torch.full_like(made.k_NGBD, 7.0),
            torch.full_like(made.v_NGBD, 7.0),
            made.step,
            made.rows,
        )
        for _ in range(2)
    )
    return one, two


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[found.dtype]
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def check(made: PagedStep, rope: RopeTable, norms: tuple[Tensor, Tensor, float] | None, parts: int = 0) -> None:
    one, two = twice(made)
    given: list[Tensor | Parts] = [one.qkv_TN, two.qkv_TN]
    if parts:
        shape = (parts + 1, *made.qkv_TN.shape)
        generator = torch.Generator(made.qkv_TN.device).manual_seed(3)
        data = torch.randn(shape, generator=generator, device=made.qkv_TN.device)
        data[parts] = float("nan")  # beyond the count
        given = [Parts(data, parts)] * 2
    wanted = reference.qk_write(given[0], rope, norms, one.k_NGBD, one.v_NGBD, made.step, check=True)
    found = cuda.qk_write(given[1], rope, norms, two.k_NGBD, two.v_NGBD, made.step, check=True)
    assert found.dtype is made.k_NGBD.dtype
    assert not made.step.flags_R.any()
    for left, right in ((found, wanted), (two.k_NGBD, one.k_NGBD), (two.v_NGBD, one.v_NGBD)):
        close(left, right)
    if not parts:
        close(two.qkv_TN, one.qkv_TN)  # keys of prompts are read from there; values are as they were
        assert found.data_ptr() == two.qkv_TN.data_ptr()


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotated", "normed", "parts"),
    [
        ((9, 3), 24, 24, True, 0),
        ((4, 4), 16, 8, True, 3),
        ((5, 1), 40, 10, False, 1),
        *(
            pytest.param(heads, head_dim, rotated, normed, parts, marks=pytest.mark.slow)
            for heads in ((4, 4), (9, 3), (5, 1))
            for head_dim, rotated in ((16, 16), (24, 24), (16, 8), (40, 10))
            for normed in (False, True)
            for parts in (0, 1, 3)
        ),
    ],
)
def test_every_form_equals_norm_rotation_and_store_one_after_another(
    heads: tuple[int, int], head_dim: int, rotated: int, normed: bool, parts: int, place: torch.device
) -> None:
    for dtype in (torch.float32, torch.float16):
        like = torch.empty(0, device=place, dtype=dtype)
        made = paged_step(ROWS, heads=heads, head_dim=head_dim, block_tokens=5, like=like)
        check(made, angles(rotated, place), weights(head_dim, like) if normed else None, parts)


def test_blocks_take_the_tokens_of_the_step_and_nothing_else(place: torch.device) -> None:
    made, _ = twice(paged_step(ROWS, heads=(4, 2), head_dim=16, block_tokens=4, like=torch.empty(0, device=place)))
    values = made.view.v_TGD.clone()
    cuda.qk_write(made.qkv_TN, angles(16, place), None, made.k_NGBD, made.v_NGBD, made.step, check=False)
    slots = made.step.slot_mapping_T
    assert torch.equal(made.v_NGBD[slots // 4, :, slots % 4], values)
    for pages in (made.k_NGBD, made.v_NGBD):
        pages[slots // 4, :, slots % 4] = 7.0
        assert bool((pages == 7.0).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_key_or_value_that_is_not_finite_flags_its_row_alone_where_asked(bad: float, place: torch.device) -> None:
    """Numbers of a token: 4 heads of queries, 2 of keys, 2 of values, 16 each."""
    for column, flagged in ((3, False), (4 * 16 + 1, True), (5 * 16 + 15, True), (7 * 16 + 15, True)):
        made, _ = twice(paged_step(FEW, heads=(4, 2), head_dim=16, block_tokens=4, like=torch.empty(0, device=place)))
        made.qkv_TN[2, column] = bad
        given = (made.qkv_TN, angles(16, place), None, made.k_NGBD, made.v_NGBD, made.step)
        cuda.qk_write(*given, check=False)
        assert not made.step.flags_R.any()
        made.step.flags_R[1] = 8
        cuda.qk_write(*given, check=True)
        assert made.step.flags_R.tolist() == [0, 8 | KV_NOT_FINITE if flagged else 8]
        made.step.flags_R.zero_()
        reference.qk_write(*given, check=True)
        assert made.step.flags_R.tolist() == [0, KV_NOT_FINITE if flagged else 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_float16_cannot_hold_is_not_finite(place: torch.device) -> None:
    like = torch.empty(0, device=place, dtype=torch.float16)
    made, _ = twice(paged_step(FEW, heads=(4, 2), head_dim=16, block_tokens=4, like=like))
    data = torch.zeros(1, 3, 128, device=place)
    data[0, 0, 127] = 70_000.0
    cuda.qk_write(Parts(data, 1), angles(16, place), None, made.k_NGBD, made.v_NGBD, made.step, check=True)
    assert made.step.flags_R.tolist() == [KV_NOT_FINITE, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("contiguous", [True, False])
def test_keys_and_values_that_are_ready_are_stored_whatever_their_strides(
    contiguous: bool, place: torch.device
) -> None:
    one, two = twice(paged_step(ROWS, heads=(4, 3), head_dim=24, block_tokens=4, like=torch.empty(0, device=place)))
    k_TGD, v_TGD = one.view
    if not contiguous:  # as transformers' modules leave them
        k_TGD = k_TGD.transpose(0, 1).contiguous().transpose(0, 1)
    reference.kv_store(k_TGD, v_TGD, one.k_NGBD, one.v_NGBD, one.step, check=True)
    cuda.kv_store(k_TGD, v_TGD, two.k_NGBD, two.v_NGBD, two.step, check=True)
    assert torch.equal(one.k_NGBD, two.k_NGBD)
    assert torch.equal(one.v_NGBD, two.v_NGBD)
    assert not one.step.flags_R.any()
    cuda.kv_store(k_TGD / 0, v_TGD, two.k_NGBD, two.v_NGBD, two.step, check=True)
    assert two.step.flags_R.tolist() == [KV_NOT_FINITE] * 4


def test_the_table_holds_what_the_models_own_module_computes() -> None:
    class Rotary(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            angle = position_ids[..., None].float() * torch.tensor([0.5, 0.01])
            both = torch.cat((angle, angle), -1)
            return (both.cos() * 1.2).to(x.dtype), (both.sin() * 1.2).to(x.dtype)

    table = RopeTable.of(Rotary(), 50, torch.device("cpu"))
    assert table.rotated == 4
    assert table.cos_CP.shape == table.sin_CP.shape == (50, 2)
    torch.testing.assert_close(table.sin_CP[7], torch.tensor([3.5, 0.07]).sin() * 1.2)


def test_shapes_that_do_not_fit_are_refused_with_both_sides_named() -> None:
    made = paged_step(ROWS, heads=(4, 2), head_dim=16, block_tokens=4, like=torch.empty(0))
    rope, given = angles(16, torch.device("cpu")), (made.k_NGBD, made.v_NGBD, made.step)
    with pytest.raises(ValueError, match=r"\(3, 128\) of 15 tokens"):
        launch.qk_write(made.qkv_TN[:3], rope, None, *given, check=False)
    with pytest.raises(ValueError, match="32 rotated"):
        launch.qk_write(made.qkv_TN, angles(32, torch.device("cpu")), None, *given, check=False)
    with pytest.raises(ValueError, match="float16"):
        launch.qk_write(made.qkv_TN.half(), rope, None, *given, check=False)
    with pytest.raises(ValueError, match=r"norms \(\(8,\)"):
        launch.qk_write(made.qkv_TN, rope, (torch.ones(8), torch.ones(8), 1e-5), *given, check=False)
    with pytest.raises(ValueError, match=r"\(15, 1, 16\)"):
        launch.kv_store(made.view.k_TGD[:, :1], made.view.v_TGD, *given, check=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotated"),
    [
        ((32, 8), 128, 128),
        ((32, 4), 128, 128),
        ((9, 3), 64, 64),
        ((8, 8), 80, 80),
        ((16, 8), 256, 256),
        ((12, 4), 96, 24),
    ],
    ids=str,
)
def test_on_a_card_bfloat16_is_rounded_once(heads: tuple[int, int], head_dim: int, rotated: int) -> None:
    place = torch.device("cuda")
    like = torch.empty(0, device=place, dtype=torch.bfloat16)
    for rows in (ROWS, [(at, 1) for at in range(70)], [(3, 1), (0, 3000)]):
        made = paged_step(rows, heads=heads, head_dim=head_dim, block_tokens=16, like=like)
        for norms in (None, weights(head_dim, like)):
            for parts in (0, 2):
                check(made, angles(rotated, place, 4096), norms, parts)
