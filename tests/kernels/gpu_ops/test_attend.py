"""Attention over a step's tensors: Triton's kernels and the definition against float64 over the plain history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.kernels.ops.configs import Config
from diptych.kernels.ops.paged_attention import cuda, launch, reference
from diptych.kernels.ops.paged_attention.params import AttentionParams
from diptych.kernels.ops.paged_attention.testing import PagedStep, exact, paged_step

SMALL_TILE = Config(16, 16, 0, 0, 4, 2)
SMALL = (8, SMALL_TILE)  # programs wanted at once, tile of prompts

# (tokens before, new tokens): decoding rows first. Off the edges of blocks and tiles, cut rows, cut prefixes.
ROWS: dict[str, list[tuple[int, int]]] = {
    "one token, nothing before": [(0, 1)],
    "one long row": [(699, 1)],
    "decode around the edges": [(0, 1), (3, 1), (15, 1), (16, 1), (62, 1), (63, 1), (64, 1)],
    "one long among short": [(2, 1), (900, 1), (17, 1)],
    "prompts off the edges": [(0, 2), (0, 15), (0, 16), (0, 17), (0, 33)],
    "chunks behind a prefix": [(5, 3), (16, 17), (31, 40)],
    "a long prefix": [(555, 5)],
    "decode, prefill and chunk mixed": [(37, 1), (0, 1), (300, 1), (0, 9), (8, 8), (70, 20), (4, 2)],
}

QUICK = {"one long row", "a long prefix", "decode, prefill and chunk mixed"}  # a tile costs the interpreter 10 ms


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """By the norm of each token and head: an error in one row must not hide behind the others."""
    error = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-3)
    worst = float(error.max()) if bool(error.isfinite().all()) else float("nan")
    assert worst <= tolerance, f"{worst:.2e} at (token, head) {divmod(int(error.argmax()), error.shape[1])}"


def compute(made: PagedStep, params: AttentionParams, *, new_rows: bool, tile: Config | None = None) -> Tensor:
    out_THD = torch.full(made.q_THD.shape, float("nan"), dtype=made.q_THD.dtype, device=made.q_THD.device)
    splits = made.step.splits
    assert splits is not None
    cuda.plan(made.step, splits)
    view = made.view if new_rows else None
    given = (made.k_NGBD, made.v_NGBD, made.step)
    if tile is None:
        cuda.attend(made.q_THD, view, *given, params, out_THD)
    else:
        if made.step.decode_rows:
            cuda.rows(made.q_THD, *given, splits, params, out_THD, config=tile)
        if made.step.prompt_rows:
            cuda.prompts(made.q_THD, view, *given, splits, params, out_THD)
    assert not splits.tickets.any()  # the next launch counts from 0
    return out_THD


@pytest.mark.parametrize(
    "rows",
    [pytest.param(rows, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, rows in ROWS.items()],
)
@pytest.mark.parametrize(
    "heads",
    [(2, 2), *(pytest.param(heads, marks=pytest.mark.slow) for heads in ((6, 2), (4, 4), (17, 1)))],
    ids=str,
)
@pytest.mark.parametrize("new_rows", [True, False], ids=["new rows", "blocks only"])
def test_every_shape_of_a_step_equals_attention_over_the_history(
    rows: list[tuple[int, int]], heads: tuple[int, int], new_rows: bool, place: torch.device
) -> None:
    if not new_rows and rows[-1][1] == 1:
        pytest.skip("no prompt")
    params = AttentionParams(0.31)
    made = paged_step(rows, heads=heads, head_dim=16, block_tokens=5, like=torch.empty(0, device=place), limits=SMALL)
    wanted = exact(made, params)
    for _ in range(2):  # the second finds what the first left
        near(compute(made, params, new_rows=new_rows, tile=SMALL_TILE), wanted, 1e-5)
    out_THD = torch.empty_like(made.q_THD)
    reference.attend(made.q_THD, None, made.k_NGBD, made.v_NGBD, made.step, params, out_THD)
    near(out_THD, wanted, 1e-5)


PARAMS = {
    "window 1": AttentionParams(0.25, window=1),
    "window 7": AttentionParams(0.25, window=7),
    "window 40 and cap": AttentionParams(0.25, window=40, softcap=2.0),
    "window 300": AttentionParams(0.25, window=300),
    "cap": AttentionParams(0.25, softcap=1.5),
    "sinks": AttentionParams(0.25, sinks_H=torch.linspace(-2, 3, 6)),
    "window and sinks": AttentionParams(0.25, window=20, sinks_H=torch.linspace(-2, 3, 6)),
}


@pytest.mark.parametrize(
    "rows",
    [
        [(37, 1), (0, 1), (8, 8), (70, 20)],
        *(pytest.param(ROWS[name], marks=pytest.mark.slow) for name in sorted(QUICK)),
    ],
    ids=["short", *sorted(QUICK)],
)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_windows_caps_and_sinks_are_honoured(
    rows: list[tuple[int, int]], params: AttentionParams, place: torch.device
) -> None:
    if params.sinks_H is not None:
        params = params._replace(sinks_H=params.sinks_H.to(place))
    made = paged_step(
        rows,
        heads=(6, 2),
        head_dim=16,
        block_tokens=4,
        like=torch.empty(0, device=place),
        windows=(None, params.window, 9),
        limits=SMALL,
    )
    wanted = exact(made, params)
    for new_rows in (True, False):
        near(compute(made, params, new_rows=new_rows, tile=SMALL_TILE), wanted, 1e-5)


@pytest.mark.parametrize(
    ("head_dim", "block_tokens"),
    [
        (24, 3),
        (40, 1),
        *(pytest.param(dim, size, marks=pytest.mark.slow) for dim in (8, 24, 40, 64) for size in (1, 16)),
    ],
)
def test_head_and_block_sizes_that_are_no_powers_of_two_are_right(
    head_dim: int, block_tokens: int, place: torch.device
) -> None:
    rows = ROWS["decode, prefill and chunk mixed"]
    like = torch.empty(0, device=place, dtype=torch.float16)
    made = paged_step(rows, heads=(4, 2), head_dim=head_dim, block_tokens=block_tokens, like=like, limits=SMALL)
    params = AttentionParams(head_dim**-0.5)
    near(compute(made, params, new_rows=True, tile=SMALL_TILE), exact(made, params), 4e-3)


def test_a_row_that_is_not_sound_spoils_no_other(place: torch.device) -> None:
    """Tiles of keys reach into the next prompt's rows, whose NaN times a weight of 0 is NaN."""
    made = paged_step(
        [(40, 1), (0, 5), (3, 9), (0, 4)],
        heads=(4, 2),
        head_dim=16,
        block_tokens=4,
        like=torch.empty(0, device=place),
        limits=SMALL,
    )
    params = AttentionParams(0.25)
    wanted = exact(made, params)
    made.qkv_TN[6:15] = float("nan")  # the third row's
    slots = made.step.slot_mapping_T[6:15]
    for pages in (made.k_NGBD, made.v_NGBD):
        pages[slots // 4, :, slots % 4] = float("nan")
    for new_rows in (True, False):
        out_THD = compute(made, params, new_rows=new_rows, tile=SMALL_TILE)
        assert out_THD[6:15].isnan().all()
        sound = [*range(6), *range(15, 19)]
        near(out_THD[sound], wanted[sound], 1e-5)


def test_what_the_work_list_was_not_made_for_is_refused(place: torch.device) -> None:
    like = torch.empty(0, device=place)
    made = paged_step([(3, 1)], heads=(4, 2), head_dim=16, block_tokens=4, like=like, limits=SMALL)
    splits = made.step.splits
    assert splits is not None
    with pytest.raises(ValueError, match="window 5"):
        compute(made, AttentionParams(0.25, window=5), new_rows=False)
    wide = paged_step([(3, 1)] * 9, heads=(4, 2), head_dim=16, block_tokens=4, like=like, limits=SMALL)
    with pytest.raises(ValueError, match="room for 1"):
        cuda.plan(wide.step, splits)


def test_shapes_that_do_not_fit_are_refused_with_both_sides_named() -> None:
    made = paged_step([(3, 2)], heads=(4, 2), head_dim=16, block_tokens=4, like=torch.empty(0))
    params, out_THD = AttentionParams(0.25), torch.empty_like(made.q_THD)
    given = (made.k_NGBD, made.v_NGBD, made.step)
    with pytest.raises(ValueError, match=r"\(1, 4, 16\).*\(5, 2, 4, 16\)"):
        launch.attend(made.q_THD[:1], None, *given, params, out_THD)
    with pytest.raises(ValueError, match="float16"):
        launch.attend(made.q_THD, None, *given, params, out_THD.half())
    with pytest.raises(ValueError, match="contiguous"):
        launch.attend(made.q_THD, None, *given, params, torch.empty(2, 16, 4).transpose(1, 2))
    with pytest.raises(ValueError, match=r"\(1, 2, 16\)"):
        launch.attend(made.q_THD, launch.QkvView(*(part[:1] for part in made.view)), *given, params, out_THD)
    with pytest.raises(ValueError, match="not positive"):
        launch.attend(made.q_THD, None, *given, AttentionParams(-1.0), out_THD)
    assert "head sizes up to 256" in (launch.refusal(100, torch.bfloat16) or "")
    assert launch.refusal(80, torch.bfloat16) is None
    assert launch.refusal(128, torch.float64) is not None


CARD_ROWS = {
    "alone": [(5000, 1)],
    "short": [(130, 1)],
    "ragged": [(11, 1), (3000, 1), (0, 1), (777, 1), (64, 1), (255, 1), (20_000, 1)],
    "many": [(97 + 13 * (at % 41), 1) for at in range(200)],
    "mixed": [(1000, 1), (31, 1), (0, 700), (4100, 50), (33, 129), (0, 64), (2, 2)],
    "a few tokens behind a long prefix": [(9001, 40)],
    "one prompt": [(0, 2500)],
}
CARD_SHAPES = [
    # (query heads, KV heads), head size, block size
    ((32, 8), 128, 16),
    ((32, 4), 128, 16),
    ((9, 3), 64, 16),
    ((32, 8), 64, 32),
    ((8, 8), 80, 16),
    ((12, 4), 96, 24),
    ((16, 4), 160, 16),
    ((16, 8), 256, 16),
    ((71, 1), 64, 16),
    ((16, 1), 256, 64),
    ((32, 8), 128, 5),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim", "block_tokens"), CARD_SHAPES, ids=str)
def test_on_a_card_every_configuration_of_the_tables_is_right(
    heads: tuple[int, int], head_dim: int, block_tokens: int
) -> None:
    """One compiler's bug made a 64 x 128 tile wrong without a word."""
    params = AttentionParams(head_dim**-0.5)
    for rows in CARD_ROWS.values():
        like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
        made = paged_step(rows, heads=heads, head_dim=head_dim, block_tokens=block_tokens, like=like)
        wanted = exact(made, params)
        for new_rows in (True, False) if made.step.prompt_rows else (True,):
            for _ in range(2):
                near(compute(made, params, new_rows=new_rows), wanted, 1.5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_on_a_card_windows_caps_and_sinks_are_honoured(head_dim: int) -> None:
    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    sinks = torch.linspace(-2, 3, 8, device="cuda")
    for params in (
        AttentionParams(head_dim**-0.5, window=1000),
        AttentionParams(head_dim**-0.5, window=130, softcap=30.0),
        AttentionParams(head_dim**-0.5, window=128, sinks_H=sinks.bfloat16()),
    ):
        for rows in CARD_ROWS.values():
            made = paged_step(
                rows, heads=(8, 2), head_dim=head_dim, block_tokens=16, like=like, windows=(None, params.window)
            )
            for new_rows in (True, False):
                near(compute(made, params, new_rows=new_rows), exact(made, params), 1.5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_card_float32_is_computed_as_such(head_dim: int) -> None:
    """Not in tf32, whose error is 3e-4: a model's tokens are compared in float32."""
    for rows in CARD_ROWS.values():
        like = torch.empty(0, device="cuda")
        made = paged_step(rows, heads=(9, 3), head_dim=head_dim, block_tokens=16, like=like)
        params = AttentionParams(head_dim**-0.5)
        near(compute(made, params, new_rows=True), exact(made, params), 2e-5)


@pytest.mark.gpu
def test_on_a_card_a_graph_follows_lengths_that_change_after_its_capture() -> None:
    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    made = paged_step([(3000, 1)] * 8, heads=(32, 8), head_dim=128, block_tokens=16, like=like)
    params, out_THD = AttentionParams(128**-0.5), torch.empty_like(made.q_THD)

    def run() -> None:
        launch.plan_splits(made.step)
        launch.attend(made.q_THD, None, made.k_NGBD, made.v_NGBD, made.step, params, out_THD)

    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    for lengths in ([3001] * 8, [1, 2, 3, 64, 65, 500, 3001, 1000], [1] * 8):
        made.step.seq_len_R.copy_(torch.tensor(lengths, dtype=torch.int32))
        out_THD.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        cut = PagedStep(made.qkv_TN, made.k_NGBD, made.v_NGBD, made.step, tuple((n - 1, 1) for n in lengths))
        near(out_THD, exact(cut, params), 1.5e-2)
