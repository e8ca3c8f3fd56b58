"""Attention of single tokens in native code: against float64, the reference, bad numbers and bad blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diptych.kernels.native import build
from diptych.kernels.ops.paged_attention import cpu, reference
from diptych.kernels.ops.paged_attention.params import AttentionParams
from diptych.kernels.ops.paged_attention.singles import Singles, can_attend
from diptych.kernels.ops.ragged import RaggedBatch, Segment, build_batch

pytestmark = pytest.mark.skipif(build.library() is None, reason=f"no native code: {build.why_missing()}")
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    batch: RaggedBatch
    q: Tensor
    k: Tensor
    v: Tensor

    def attend(self, params: AttentionParams) -> Tensor:
        """By the CPU's implementation; the path under test must have been taken."""
        taken = can_attend(self.q, self.k, self.v)
        out = cpu.paged_attention(self.q, self.k, self.v, self.batch, params)
        singles = self.batch.once("singles", lambda: None)
        assert taken
        assert (singles is not None) == any(segment.num_tokens == 1 for segment in self.batch.segments)
        return out


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_case(
    ends: list[int],
    *,
    block_tokens: int = 5,
    heads: tuple[int, int] = (6, 2),
    dim: int = 24,
    dtype: torch.dtype = torch.float32,
    new: list[int] | None = None,
) -> Case:
    """Sequences of these lengths with one new token each, or `new`; blocks in random order, unused places finite."""
    generator = torch.Generator().manual_seed(dim * 1000 + len(ends))
    counts = [-(-end // block_tokens) for end in ends]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    segments, first = [], 0
    for end, count, num in zip(ends, counts, new or [1] * len(ends), strict=True):
        blocks, order = order[:count], order[count:]
        segments.append(Segment(first, num, end - num, blocks))
        first += num

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pool = (sum(counts) + 2, heads[1], block_tokens, dim)
    return Case(build_batch(segments, block_tokens, CPU), numbers(first, heads[0], dim), numbers(*pool), numbers(*pool))


def exact(case: Case, params: AttentionParams) -> Tensor:
    """In float64, one head of one token after another."""
    out = torch.empty(case.q.shape, dtype=torch.float64)
    group = case.q.shape[1] // case.k.shape[1]
    for segment in case.batch.segments:
        for index in range(segment.num_tokens):
            end = segment.start + index + 1
            begin = 0 if params.window is None else max(0, end - params.window)
            places = [divmod(position, case.batch.block_tokens) for position in range(begin, end)]
            blocks, offsets = [segment.blocks[block] for block, _ in places], [offset for _, offset in places]
            for head in range(case.q.shape[1]):
                k, v = (pool[blocks, head // group, offsets].double() for pool in (case.k, case.v))
                scores = k @ case.q[segment.first + index, head].double() * params.scaling
                if params.softcap is not None:
                    scores = params.softcap * torch.tanh(scores / params.softcap)
                if params.sinks_H is not None:
                    scores = torch.cat((scores, params.sinks_H[head : head + 1].double()))
                out[segment.first + index, head] = torch.softmax(scores, 0)[: len(v)] @ v
    return out


def assert_right(case: Case, params: AttentionParams) -> None:
    tolerance, out = TOLERANCE[case.q.dtype], case.attend(params)
    torch.testing.assert_close(out.double(), exact(case, params), atol=tolerance, rtol=tolerance)
    defined = reference.paged_attention(case.q, case.k, case.v, case.batch, params)
    torch.testing.assert_close(out.float(), defined.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 5, 8, 16, 17, 24, 64, 80, 96, 128, 256, 511, 512])
def test_every_head_size_up_to_the_largest_is_right(dim: int, dtype: torch.dtype, threads: int) -> None:
    case = make_case([1, 2, 33, 40], block_tokens=16, dim=dim, dtype=dtype)
    assert_right(case, AttentionParams(dim**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("group", range(1, 13))
def test_every_number_of_heads_to_a_kv_head_is_right(group: int, kv_heads: int, dtype: torch.dtype) -> None:
    for ends in ([37], [3, 8, 70, 1, 20]):  # heads are shared out, or whole sequences
        assert_right(make_case(ends, heads=(group * kv_heads, kv_heads), dtype=dtype), AttentionParams(0.2))


@pytest.mark.parametrize("block_tokens", [1, 5, 16, 33, 128])
@pytest.mark.parametrize("num", [1, 2, 4, 9, 20])
def test_every_block_size_and_number_of_sequences_is_right(block_tokens: int, num: int, threads: int) -> None:
    edges = [1, block_tokens, block_tokens + 1, 2 * block_tokens - 1 or 1, 31, 32, 33, 130]
    ends = [edges[index % len(edges)] for index in range(num)]
    assert_right(make_case(ends, block_tokens=block_tokens, dim=16), AttentionParams(0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 32, 33, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-4, 5, 6)])
def test_windows_caps_and_sinks_are_honoured_together(
    window: int | None, softcap: float | None, sinks: Tensor | None, dtype: torch.dtype
) -> None:
    params = AttentionParams(0.4, window, softcap, None if sinks is None else sinks.to(dtype))
    assert_right(make_case([1, 4, 5, 6, 64, 90], dtype=dtype), params)


def test_random_mixes_with_prompts_and_chunks_are_right(threads: int) -> None:
    rng = random.Random(5)
    for _ in range(25):
        new = [rng.choice([1, 1, 1, 3, 3, 8]) for _ in range(rng.randint(1, 20))]
        ends = [num + rng.choice([0, 0, rng.randint(0, 60)]) for num in new]
        case = make_case(ends, block_tokens=rng.choice([1, 3, 16]), new=new, dim=rng.choice([8, 16, 40]))
        assert_right(case, AttentionParams(0.3, window=rng.choice([None, 7])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_may_be_views_of_a_wider_row_or_lie_in_another_order(dtype: torch.dtype) -> None:
    case = make_case([9, 40, 3], dtype=dtype)
    wanted = case.attend(AttentionParams(0.2))
    wide = torch.full((3, 11, 24), float("nan"), dtype=dtype)
    wide[:, 2:8] = case.q
    turned = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    for q in (wide[:, 2:8], turned):
        assert not q.is_contiguous()
        assert torch.equal(replace(case, q=q).attend(AttentionParams(0.2)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e3, 1e6, 1e15])
def test_scores_of_any_size_overflow_nothing(scale: float, dtype: torch.dtype) -> None:
    """A softmax that subtracted no maximum, or another chunk's, would be infinite or zero everywhere."""
    case = make_case([1, 31, 32, 33, 100], dtype=dtype)
    case.q *= scale
    out = case.attend(AttentionParams(1.0))
    assert out.isfinite().all()
    if scale < 1e6 or dtype is torch.float32:  # at the top the nearest keys win alone, whatever rounding says
        torch.testing.assert_close(out.double(), exact(case, AttentionParams(1.0)), atol=2e-2, rtol=2e-2)


def test_scores_of_minus_infinity_weigh_nothing_even_where_a_whole_chunk_has_them() -> None:
    case = make_case([90, 90], block_tokens=16, dim=16)
    case.q[:] = 1.0
    for block in case.batch.segments[0].blocks[:4]:  # of 64 tokens, which are two chunks
        case.k[block] = float("-inf")
    out = case.attend(AttentionParams(0.2))
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), exact(case, AttentionParams(0.2)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("num", [2, 12])
def test_a_bad_number_reaches_its_own_sequence_only(bad: float, which: str, num: int, threads: int) -> None:
    case = make_case([40] * num, block_tokens=16)
    clean = case.attend(AttentionParams(0.2))
    pool: Tensor = getattr(case, which)
    pool[case.batch.segments[1].blocks[1], :, 3] = bad
    out = case.attend(AttentionParams(0.2))
    others = [index for index in range(num) if index != 1]
    assert torch.equal(out[others], clean[others])
    if bad != float("-inf") or which == "v":
        assert not out[1].isfinite().all()


def test_the_unused_tail_of_a_block_and_what_lies_before_the_window_are_not_read() -> None:
    case = make_case([18, 50], block_tokens=16)
    wanted = case.attend(AttentionParams(0.2, window=4))
    for pool in (case.k, case.v):
        seen = {0: [*range(14, 18)], 1: [*range(46, 50)]}
        kept = pool.clone()
        pool[:] = float("nan")
        for index, positions in seen.items():
            for position in positions:
                block = case.batch.segments[index].blocks[position // 16]
                pool[block, :, position % 16] = kept[block, :, position % 16]
    assert torch.equal(case.attend(AttentionParams(0.2, window=4)), wanted)


def test_the_answer_does_not_depend_on_company_or_threads() -> None:
    """In float32 and bfloat16 alike: whole sequences and single heads are shared out by the same arithmetic."""
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case([40, 7, 90, 12, 33, 64, 2, 5, 77], dtype=dtype)
        together = case.attend(AttentionParams(0.2))
        try:
            torch.set_num_threads(2)
            assert torch.equal(case.attend(AttentionParams(0.2)), together)
        finally:
            torch.set_num_threads(before)
        for segment in case.batch.segments:
            alone = build_batch([replace(segment, first=0)], 5, CPU)
            out = replace(case, batch=alone, q=case.q[segment.first][None]).attend(AttentionParams(0.2))
            assert torch.equal(out[0], together[segment.first])


@pytest.mark.parametrize("dim", [513, 528, 1024])
def test_a_larger_head_goes_to_torch_and_is_right(dim: int) -> None:
    """Native code keeps a head's sums in an array of fixed size on the stack."""
    assert build.most_head_dim() == 512
    case = make_case([3, 40], dim=dim)
    assert not can_attend(case.q, case.k, case.v)
    params = AttentionParams(dim**-0.5)
    out = cpu.paged_attention(case.q, case.k, case.v, case.batch, params)
    torch.testing.assert_close(out.double(), exact(case, params), atol=2e-5, rtol=2e-5)


def test_a_type_that_native_code_does_not_know_goes_to_torch_in_the_same_step_too() -> None:
    """The plan of a step is kept: one without its single tokens must not serve a layer that computes them there."""
    case = make_case([3, 40, 9], new=[1, 4, 1])
    params = AttentionParams(0.2)
    case.attend(params)
    double = replace(case, q=case.q.double(), k=case.k.double(), v=case.v.double())
    assert not can_attend(double.q, double.k, double.v)
    out = cpu.paged_attention(double.q, double.k, double.v, case.batch, params)
    torch.testing.assert_close(out, exact(case, params), atol=1e-9, rtol=1e-9)


def test_keys_that_do_not_lie_side_by_side_are_not_read_as_if_they_did() -> None:
    case = make_case([3, 40])
    wide = torch.cat((case.k, case.k), dim=-1)[..., :24]
    assert not can_attend(case.q, wide, case.v)
    with pytest.raises(RuntimeError):  # torch's own
        cpu.paged_attention(case.q, wide, case.v, case.batch, AttentionParams(0.2))


@pytest.mark.parametrize("block", [-1, 1 << 40, 11])
def test_a_block_that_the_arena_does_not_have_is_refused(block: int) -> None:
    """Read where it falls, it would end the process or hand out another's memory."""
    case = make_case([20, 25])
    assert len(case.k) == 11
    segments = [case.batch.segments[0], Segment(1, 1, 24, [*case.batch.segments[1].blocks[:2], block, 0, 0])]
    with pytest.raises(IndexError, match="a block that the arena does not have"):
        replace(case, batch=build_batch(segments, 5, CPU)).attend(AttentionParams(0.2))


def test_a_step_without_single_tokens_has_none() -> None:
    assert Singles.find(make_case([3, 9], new=[3, 2]).batch) is None
