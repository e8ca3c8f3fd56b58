"""Head sizes and groups of real models through the launch tables: decoding, prompts, chunks, deterministic or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diptych.kernels.ops.paged_attention import cuda
from diptych.kernels.ops.paged_attention.params import AttentionParams
from diptych.kernels.ops.paged_attention.split import allocate
from diptych.kernels.ops.paged_attention.testing import PagedStep, exact, paged_step
from diptych.kernels.ops.qk_write import cuda as qk_cuda
from diptych.kernels.ops.qk_write import reference as qk_reference
from diptych.kernels.ops.qk_write.rope import RopeTable

SIZES = (64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 12, 16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
QUICK = ((80, 7), (192, 3))
PAIRS = [
    pytest.param(dim, group, marks=() if (dim, group) in QUICK else pytest.mark.slow)
    for dim in SIZES
    for group in GROUPS
    if dim in (64, 128) or group in (1, 3, 7, 16)
]
DTYPES = [
    pytest.param(torch.float32, marks=pytest.mark.slow),
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def attended(made: PagedStep, params: AttentionParams) -> Tensor:
    out_THD = torch.full(made.q_THD.shape, float("nan"), dtype=made.q_THD.dtype, device=made.q_THD.device)
    assert made.step.splits is not None
    cuda.plan(made.step, made.step.splits)
    cuda.attend(made.q_THD, made.view, made.k_NGBD, made.v_NGBD, made.step, params, out_THD)
    return out_THD


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), PAIRS)
def test_attention_is_right(dim: int, group: int, dtype: torch.dtype, place: torch.device) -> None:
    like = torch.empty(0, device=place, dtype=dtype)
    rows = [(70, 1), (0, 1), (0, 9), (37, 5)]
    made = paged_step(rows, heads=(group, 1), head_dim=dim, block_tokens=16, like=like)
    params = AttentionParams(dim**-0.5)
    wanted = exact(made, params)
    splits = allocate(
        max_rows=len(rows),
        max_tokens=made.step.num_tokens,
        heads=group,
        kv_heads=1,
        head_dim=dim,
        windows=(None,),
        like=like,
        invariant=True,
    )
    for step in (made.step, replace(made.step, splits=splits)):
        found = attended(replace(made, step=step), params)
        error = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(error.max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), PAIRS)
def test_queries_and_keys_are_normalised_turned_and_stored(
    dim: int, group: int, dtype: torch.dtype, place: torch.device
) -> None:
    rows = [(20, 1), (0, 3)]
    like = torch.empty(0, device=place, dtype=dtype)
    generator = torch.Generator().manual_seed(dim)
    weights = [(1 + 0.3 * torch.randn(dim, generator=generator)).to(dtype).to(place) for _ in "qk"]
    angles = torch.randn(24, dim // 2, generator=generator).to(place)
    rope, found = RopeTable(angles.cos(), angles.sin()), []
    for module in (qk_cuda, qk_reference):
        made = paged_step(rows, heads=(group, 1), head_dim=dim, block_tokens=16, like=like)
        for pages in (made.k_NGBD, made.v_NGBD):
            pages.nan_to_num_(0.0)
        queries = module.qk_write(
            made.qkv_TN, rope, (weights[0], weights[1], 1e-6), made.k_NGBD, made.v_NGBD, made.step, check=True
        )
        assert not made.step.flags_R.any()
        found.append((queries, made.k_NGBD, made.v_NGBD))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
