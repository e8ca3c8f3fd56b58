"""Attention with an invariant work list: right for every shape, and each row's bits its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.kernels.ops.configs import MEASURED, Config
from diptych.kernels.ops.paged_attention import cuda, launch
from diptych.kernels.ops.paged_attention.params import AttentionParams
from diptych.kernels.ops.paged_attention.split import COUNTS, RECORD, allocate
from diptych.kernels.ops.paged_attention.testing import PagedStep, exact, paged_step

SMALL = Config(16, 16, 0, 0, 4, 2)
MIXED = [(37, 1), (0, 1), (16, 1), (0, 9), (8, 8), (70, 20), (4, 2)]


def made_of(
    rows: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_tokens: int = 5,
    like: Tensor,
    windows: tuple[int | None, ...] = (None,),
    tile: Config | None = SMALL,
    programs: int = 8,
    seed: int = 0,
) -> PagedStep:
    made = paged_step(rows, heads=heads, head_dim=head_dim, block_tokens=block_tokens, like=like, seed=seed)
    splits = allocate(
        max_rows=len(rows) + 2,
        max_tokens=made.step.num_tokens,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        windows=windows,
        like=like,
        programs=programs,
        prompts=tile,
        invariant=True,
    )
    return replace(made, step=replace(made.step, splits=splits))


def compute(made: PagedStep, params: AttentionParams) -> Tensor:
    assert made.step.splits is not None
    cuda.plan(made.step, made.step.splits)
    out_THD = torch.full(made.q_THD.shape, float("nan"), dtype=made.q_THD.dtype, device=made.q_THD.device)
    cuda.attend(made.q_THD, made.view, made.k_NGBD, made.v_NGBD, made.step, params, out_THD)
    assert not made.step.splits.tickets.any()  # the next launch counts from 0
    return out_THD


def counts(made: PagedStep) -> set[int]:
    """In how many pieces the tiles of a planned step are."""
    assert made.step.splits is not None
    work = made.step.splits.tiles_X
    count = int(work[0])
    return {*work[COUNTS : COUNTS + RECORD * count].view(count, RECORD)[:, 6].tolist()}


def check(made: PagedStep, params: AttentionParams, tolerance: float) -> None:
    wanted = exact(made, params)
    error = (compute(made, params).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-3)
    assert float(error.max()) <= tolerance


@pytest.mark.parametrize(
    "heads",
    [(4, 2), (3, 1), *(pytest.param(heads, marks=pytest.mark.slow) for heads in ((2, 2), (14, 2), (16, 1), (33, 1)))],
    ids=str,
)
def test_every_row_is_right_for_every_group_of_heads(heads: tuple[int, int], place: torch.device) -> None:
    check(made_of(MIXED, heads=heads, like=torch.empty(0, device=place)), AttentionParams(0.3), 1e-5)


@pytest.mark.parametrize(("programs", "pieces"), [(8, {1, 2, 3}), (1, {1})])
def test_long_contexts_are_right_cut_and_uncut(programs: int, pieces: set[int], place: torch.device) -> None:
    """A piece has 512 keys; where all pieces of a step find no room, none is made."""
    rows, like = [(1099, 1), (40, 1), (600, 3), (0, 12)], torch.empty(0, device=place)
    sinks = torch.linspace(-1, 2, 2, device=place)
    for params in (AttentionParams(0.3), AttentionParams(0.3, window=700), AttentionParams(0.3, sinks_H=sinks)):
        made = made_of(rows, heads=(2, 1), like=like, windows=(None, 700), programs=programs)
        check(made, params, 1e-5)
        assert counts(made) == pieces


PARAMS = {
    "window 1": AttentionParams(0.25, window=1),
    "window 20": AttentionParams(0.25, window=20),
    "cap": AttentionParams(0.25, softcap=1.5),
    "sinks": AttentionParams(0.25, sinks_H=torch.linspace(-2, 3, 6)),
    "window, cap and sinks": AttentionParams(0.25, window=9, softcap=2.0, sinks_H=torch.linspace(-2, 3, 6)),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_windows_caps_and_sinks_are_honoured(params: AttentionParams, place: torch.device) -> None:
    if params.sinks_H is not None:
        params = params._replace(sinks_H=params.sinks_H.to(place))
    like = torch.empty(0, device=place)
    check(made_of([(37, 1), (8, 8), (70, 20)], heads=(6, 2), like=like, windows=(None, params.window)), params, 1e-5)


@pytest.mark.parametrize("head_dim", [24, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (8, 80, 96, 192))])
def test_head_sizes_that_are_no_powers_of_two_are_right(head_dim: int, place: torch.device) -> None:
    like = torch.empty(0, device=place, dtype=torch.float16)
    check(made_of(MIXED, head_dim=head_dim, like=like), AttentionParams(head_dim**-0.5), 4e-3)


@pytest.mark.parametrize(("programs", "is_cut"), [(8, True), (5, False)])
def test_each_tile_of_every_row_is_listed_once_in_all_its_pieces(
    programs: int, is_cut: bool, place: torch.device
) -> None:
    """A tile of 16 holds 8 tokens of two heads each, a piece 512 keys."""
    step = made_of(
        [(900, 1), (3, 1), (0, 17), (5000, 9)], like=torch.empty(0, device=place), programs=2 * programs
    ).step
    assert step.splits is not None
    assert (step.splits.tile_tokens, step.splits.room) == (8, 4 * programs)
    cuda.plan(step, step.splits)
    work = step.splits.tiles_X
    count = int(work[0])
    found = work[COUNTS : COUNTS + RECORD * count].view(count, RECORD)[:, 1:].tolist()
    rows = [(0, 1, 900, 2), (1, 1, 3, 1), (2, 17, 0, 1), (19, 9, 5000, 10)]
    wanted, places = [], set()
    for first, num, start, pieces in rows:
        for at in reversed(range(0, num, 8)):
            wanted += [[first, num, start, at, piece, pieces] for piece in range(pieces if is_cut else 1)]
    if not is_cut:
        wanted = [[*record[:5], 1] for record in wanted]
    assert [record[:6] for record in found] == wanted
    for *_, piece, pieces, room in found:
        if pieces > 1:
            places.add(room + piece)
    assert places == ({*range(2 + 2 * 10)} if is_cut else set())
    assert step.splits.room >= len(places)


def moved(whole: PagedStep, into: PagedStep, row: int, params: AttentionParams) -> Tensor:
    """The result of a row of `into` when it continues the single row of `whole`."""
    start, num = into.rows[row]
    first = sum(count for _, count in into.rows[:row])
    into.qkv_TN[first : first + num] = whole.qkv_TN[start : start + num]
    size = whole.step.block_tokens
    position = torch.arange(start + num, device=whole.qkv_TN.device)
    tables = (whole.step.blocks_SB[whole.step.slot_R[0].long()], into.step.blocks_SB[into.step.slot_R[row].long()])
    source, to = (table.long()[position // size] for table in tables)
    for old, new in ((whole.k_NGBD, into.k_NGBD), (whole.v_NGBD, into.v_NGBD)):
        new[to, :, position % size] = old[source, :, position % size]
    return compute(into, params)[first : first + num]


@pytest.mark.parametrize(
    ("length", "shape"),
    [
        (50, {}),
        pytest.param(
            2100, {"heads": (32, 8), "head_dim": 128, "block_tokens": 16, "tile": None}, marks=pytest.mark.gpu
        ),
        pytest.param(2100, {"heads": (9, 3), "head_dim": 64, "block_tokens": 16, "tile": None}, marks=pytest.mark.gpu),
        pytest.param(700, {"heads": (16, 1), "head_dim": 80, "block_tokens": 16, "tile": None}, marks=pytest.mark.gpu),
        pytest.param(700, {"heads": (8, 8), "head_dim": 256, "block_tokens": 5, "tile": None}, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_no_bit_depends_on_company_or_chunks(
    length: int, shape: dict[str, Any], dtype: torch.dtype, place: torch.device
) -> None:
    like = torch.empty(0, device=place, dtype=dtype)
    for window in (None, 23):
        params = AttentionParams(0.2, window=window)
        given = {**shape, "like": like, "windows": (window,)}
        whole = made_of([(0, length)], **given)
        wanted = compute(whole, params)
        third = length // 3
        for rows, row in (
            ([(length - 1, 1)], 0),
            ([(9, 1), (third, 1), (4, 1)], 1),
            ([(20, 1), (0, 7), (third, length - third)], 2),
            ([(0, third), (0, 30)], 0),
        ):
            found = moved(whole, made_of(rows, **given, seed=5), row, params)
            start, num = rows[row]
            assert torch.equal(found, wanted[start : start + num])


@pytest.mark.parametrize(
    ("length", "shape"),
    [
        (600, {"heads": (1, 1), "tile": Config(64, 16, 0, 0, 4, 2), "programs": 1}),
        *(
            pytest.param(
                9000,
                {"heads": heads, "head_dim": dim, "block_tokens": 16, "tile": None, "programs": 40},
                marks=pytest.mark.gpu,
            )
            for heads, dim in (((32, 8), 128), ((9, 3), 64), ((16, 1), 256))
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_no_bit_depends_on_whether_a_long_context_was_cut(
    length: int, shape: dict[str, Any], dtype: torch.dtype, place: torch.device
) -> None:
    given = {**shape, "like": torch.empty(0, device=place, dtype=dtype)}
    params = AttentionParams(0.2)
    whole = made_of([(0, length)], **given)
    wanted = compute(whole, params)
    assert counts(whole) == {1}
    for rows, row in (
        ([(length - 1, 1)], 0),
        ([(length - 1, 1), *[(length - 2, 1)] * (20 if place.type == "cuda" else 2)], 0),
        ([(length - 3, 3)], 0),
    ):
        made = made_of(rows, **given, seed=3)
        start, num = rows[row]
        assert torch.equal(moved(whole, made, row, params), wanted[start : start + num])
        assert (max(counts(made)) > 1) == (len(rows) == 1)


def test_the_tile_is_never_one_that_was_tuned(monkeypatch: pytest.MonkeyPatch, place: torch.device) -> None:
    """A restart after tuning must not change a bit."""
    tuned = {op: {(128, 2): Config(32, 32, 0, 0, 4, 2)} for op in ("attend_prompts", "attend_tiles")}
    monkeypatch.setattr("diptych.kernels.ops.configs._tuned", tuned)
    monkeypatch.setattr("diptych.kernels.ops.configs._found", {})
    like = torch.empty(0, device=place, dtype=torch.bfloat16)
    given: dict[str, Any] = {"max_rows": 2, "max_tokens": 8, "heads": 2, "kv_heads": 1, "head_dim": 128}
    tiles = [
        allocate(**given, windows=(None,), like=like, programs=8, invariant=invariant).prompts
        for invariant in (True, False)
    ]
    assert tiles == [MEASURED["attend_tiles"][128, 2], Config(32, 32, 0, 0, 4, 2)]


def test_the_definition_takes_what_no_kernel_does(place: torch.device) -> None:
    assert launch.refusal(256, torch.bfloat16) is None
    assert launch.refusal(260, torch.bfloat16) is not None
    assert launch.refusal(12, torch.bfloat16) is not None
