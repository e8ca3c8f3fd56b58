"""kv_write and paged attention: against attention over a plain history, and the CPU against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diptych.kernels.ops.kv_write import cpu as write_cpu
from diptych.kernels.ops.kv_write import launch as write_launch
from diptych.kernels.ops.kv_write import reference as write_reference
from diptych.kernels.ops.paged_attention import cpu, launch, reference
from diptych.kernels.ops.paged_attention.params import AttentionParams
from diptych.kernels.ops.ragged import RaggedBatch, Segment, build_batch
from diptych.kernels.ops.table import implementation
from diptych.protos.errors import StartupError

CPU = torch.device("cpu")
DIM = 16

# (start, num_tokens) of each sequence in the row, for blocks of 1, 4, 16: one off the edges, empty and long prefixes.
ROWS: dict[str, list[tuple[int, int]]] = {
    "one token, nothing before": [(0, 1)],
    "decode just before a block's end": [(2, 1), (14, 1)],
    "decode at a block's last place": [(3, 1), (15, 1)],
    "decode at a block's first place": [(4, 1), (16, 1)],
    "prompts one off the edges": [(0, 3), (0, 4), (0, 5), (0, 15), (0, 16), (0, 17)],
    "chunks behind a cached prefix": [(4, 4), (3, 2), (16, 17), (33, 1)],
    "decode, prefill and chunk mixed": [(37, 1), (0, 9), (0, 1), (5, 1), (8, 8), (70, 1)],
    "equal chunks side by side": [(0, 5), (0, 5), (7, 5), (9, 5)],
    "equal chunks with others between": [(0, 5), (3, 1), (0, 5), (60, 3), (7, 5), (0, 2), (61, 3), (90, 5)],
    "very different lengths": [(1, 1), (130, 1), (2, 1), (64, 1), (129, 1), (0, 1)],
}


@dataclass
class Case:
    batch: RaggedBatch
    q: Tensor
    k: Tensor
    v: Tensor
    k_pool: Tensor
    v_pool: Tensor
    histories: list[tuple[Tensor, Tensor]]  # keys and values of all positions of each sequence, [L, G, D]


def make_case(rows: list[tuple[int, int]], block_tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> Case:
    """Blocks in random order; places that no sequence has written hold NaN, as after a fault."""
    generator = torch.Generator().manual_seed(len(rows) * 1000 + block_tokens)
    counts = [-(-(start + num) // block_tokens) for start, num in rows]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    k_pool = torch.full((sum(counts) + 3, kv_heads, block_tokens, DIM), float("nan"), dtype=dtype)
    v_pool = k_pool.clone()
    segments, histories, first = [], [], 0
    for (start, num), count in zip(rows, counts, strict=True):
        blocks, order = order[:count], order[count:]
        keys, values = (torch.randn(start + num, kv_heads, DIM, generator=generator).to(dtype) for _ in range(2))
        if start % block_tokens:  # begun by an earlier step, which zeroed its tail
            k_pool[blocks[start // block_tokens]] = 0
            v_pool[blocks[start // block_tokens]] = 0
        for position in range(start):
            place = (blocks[position // block_tokens], slice(None), position % block_tokens)
            k_pool[place], v_pool[place] = keys[position], values[position]
        segments.append(Segment(first, num, start, blocks))
        histories.append((keys, values))
        first += num
    return Case(
        batch=build_batch(segments, block_tokens, CPU),
        q=torch.randn(first, heads, DIM, generator=generator).to(dtype),
        k=torch.cat([keys[start:] for (keys, _), (start, _) in zip(histories, rows, strict=True)]),
        v=torch.cat([values[start:] for (_, values), (start, _) in zip(histories, rows, strict=True)]),
        k_pool=k_pool,
        v_pool=v_pool,
        histories=histories,
    )


def plain_attention(case: Case, params: AttentionParams) -> Tensor:
    """Token by token over the contiguous history: knows nothing of blocks."""
    out = []
    for segment, (keys, values) in zip(case.batch.segments, case.histories, strict=True):
        for offset in range(segment.num_tokens):
            end = segment.start + offset + 1
            begin = 0 if params.window is None else max(0, end - params.window)
            group = case.q.shape[1] // keys.shape[1]
            k = keys[begin:end].double().repeat_interleave(group, 1)
            v = values[begin:end].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,lhd->hl", case.q[segment.first + offset].double(), k) * params.scaling
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            total = weights.sum(-1, keepdim=True)
            if params.sinks_H is not None:
                total = total + torch.exp(params.sinks_H.double()[:, None] - scores.amax(-1, keepdim=True))
            out.append(torch.einsum("hl,lhd->hd", weights / total, v))
    return torch.stack(out)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("block_tokens", [1, 4, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1)])
def test_both_implementations_equal_attention_over_the_history(
    rows: list[tuple[int, int]], block_tokens: int, heads: int, kv_heads: int
) -> None:
    params = AttentionParams(scaling=0.31)
    for write, attend in (
        (write_reference.kv_write, reference.paged_attention),
        (write_cpu.kv_write, cpu.paged_attention),
    ):
        case = make_case(rows, block_tokens, heads, kv_heads, torch.float32)
        write(case.k, case.v, case.k_pool, case.v_pool, case.batch)
        out = attend(case.q, case.k_pool, case.v_pool, case.batch, params)
        torch.testing.assert_close(out.double(), plain_attention(case, params), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(
    "params",
    [
        AttentionParams(0.25, window=1),
        AttentionParams(0.25, window=5),
        AttentionParams(0.25, window=16, softcap=2.0),
        AttentionParams(0.25, softcap=1.5),
        AttentionParams(0.25, sinks_H=torch.linspace(-2, 3, 6)),
        AttentionParams(0.25, window=7, sinks_H=torch.linspace(-2, 3, 6)),
    ],
    ids=["window 1", "window 5", "window and cap", "cap", "sinks", "window and sinks"],
)
def test_windows_caps_and_sinks_are_honoured(rows: list[tuple[int, int]], params: AttentionParams) -> None:
    case = make_case(rows, 4, 6, 2, torch.float32)
    write_cpu.kv_write(case.k, case.v, case.k_pool, case.v_pool, case.batch)
    wanted = plain_attention(case, params)
    for attend in (reference.paged_attention, cpu.paged_attention):
        out = attend(case.q, case.k_pool, case.v_pool, case.batch, params)
        torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_bfloat16_stays_near_the_reference(rows: list[tuple[int, int]]) -> None:
    case = make_case(rows, 16, 9, 3, torch.bfloat16)
    write_cpu.kv_write(case.k, case.v, case.k_pool, case.v_pool, case.batch)
    params = AttentionParams(DIM**-0.5)
    wanted = reference.paged_attention(case.q, case.k_pool, case.v_pool, case.batch, params)
    out = cpu.paged_attention(case.q, case.k_pool, case.v_pool, case.batch, params)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), wanted.float(), atol=2e-2, rtol=2e-2)


def test_layers_of_one_step_may_differ_in_window_and_kv_heads() -> None:
    """Indices and masks are kept per step: one layer's must not serve another with a different shape."""
    rows = ROWS["decode, prefill and chunk mixed"]
    wide, narrow = make_case(rows, 4, 6, 3, torch.float32), make_case(rows, 4, 6, 2, torch.float32)
    for case, window in ((wide, None), (narrow, 3), (wide, 6), (narrow, None)):
        write_cpu.kv_write(case.k, case.v, case.k_pool, case.v_pool, wide.batch)
        params = AttentionParams(0.2, window=window)
        out = cpu.paged_attention(case.q, case.k_pool, case.v_pool, wide.batch, params)
        torch.testing.assert_close(out.double(), plain_attention(case, params), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("block_tokens", [1, 4, 16])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_cpu_write_leaves_the_very_bytes_of_the_reference(rows: list[tuple[int, int]], block_tokens: int) -> None:
    one, two = (make_case(rows, block_tokens, 4, 2, torch.bfloat16) for _ in range(2))
    write_reference.kv_write(one.k, one.v, one.k_pool, one.v_pool, one.batch)
    write_cpu.kv_write(two.k, two.v, two.k_pool, two.v_pool, two.batch)
    for left, right in ((one.k_pool, two.k_pool), (one.v_pool, two.v_pool)):
        assert torch.equal(left.view(torch.int16), right.view(torch.int16))


def test_a_write_never_touches_other_sequences_blocks() -> None:
    case = make_case(ROWS["chunks behind a cached prefix"], 4, 4, 2, torch.float32)
    used = {block for segment in case.batch.segments for block in segment.blocks}
    write_cpu.kv_write(case.k, case.v, case.k_pool, case.v_pool, case.batch)
    untouched = [block for block in range(len(case.k_pool)) if block not in used]
    assert len(untouched) == 3
    assert case.k_pool[untouched].isnan().all()
    for segment, (keys, _) in zip(case.batch.segments, case.histories, strict=True):
        for position in range(segment.start):  # the cached prefix is as it was
            assert torch.equal(case.k_pool[segment.blocks[position // 4], :, position % 4], keys[position])


def test_shapes_that_do_not_fit_are_refused_with_both_sides_named() -> None:
    case = make_case([(0, 3)], 4, 4, 2, torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 2, 16\).*3 tokens.*\(4, 2, 4, 16\)"):
        write_launch.kv_write(case.k[:2], case.v[:2], case.k_pool, case.v_pool, case.batch)
    with pytest.raises(ValueError, match=r"\(3, 3, 16\).*\(4, 2, 4, 16\)"):
        launch.paged_attention(case.q[:, :3], case.k_pool, case.v_pool, case.batch, AttentionParams(1.0))
    other = build_batch([Segment(0, 3, 0, (0,))], 8, CPU)
    with pytest.raises(ValueError, match="8 tokens a block"):
        launch.paged_attention(case.q, case.k_pool, case.v_pool, other, AttentionParams(1.0))


def test_an_unknown_device_type_is_refused_and_the_known_ones_are_named() -> None:
    assert implementation("paged_attention", "cpu").__name__.endswith("paged_attention.cpu")
    with pytest.raises(StartupError, match=r"'tpu'.*cpu, cuda"):
        implementation("paged_attention", "tpu")
