"""How cases are timed, with a clock in place of a card's; and what other projects' kernels are given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.kernels.ops import measure as timing
from diptych.kernels.ops.cases import Case, Peer
from diptych.kernels.ops.measure import Ceilings, calls_over, calls_within, measure
from diptych.kernels.ops.moe import bench as moe_bench
from diptych.kernels.ops.moe.experts import MoeWorkspace
from diptych.kernels.ops.paged_attention import peers
from diptych.kernels.ops.paged_attention.params import AttentionParams
from diptych.kernels.ops.paged_attention.testing import PagedStep, exact, paged_step

LIMITS = Ceilings(1000.0, 100.0)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call takes the microseconds that its function has as `us`; gives the number of calls of each graph."""
    made: list[int] = []

    def microseconds(calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
        made.append(len(calls))
        for call in calls:
            call()
        return float(calls[0].func.us)  # type: ignore[attr-defined]

    monkeypatch.setattr(timing, "microseconds", microseconds)
    monkeypatch.setattr(timing, "_timed", lambda calls: calls[0].func.us)
    monkeypatch.setattr(timing, "input_sets", lambda make, size_bytes: [make() for _ in range(3)])
    return made


class Work:
    """Takes `us`; remembers what it was given."""

    def __init__(self, us: float) -> None:
        self.us = us
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, *inputs: Any) -> None:
        self.given.append(inputs)


def test_rates_are_told_beside_the_ceiling_and_the_best_peer(graphs: list[int]) -> None:
    ours, slow, fast = Work(10.0), Work(30.0), Work(25.0)
    prepared = Peer(prepare=lambda number: (-number,), run=fast)
    numbers = iter(range(1, 10))
    found = measure(
        Case(
            name="x",
            make=lambda: (next(numbers),),
            run=ours,
            size_bytes=5_000_000,
            peers={"slow": slow, "fast": prepared},
        ),
        LIMITS,
    )
    assert (found["us"], found["gb_s"], found["of_ceiling"], found["of_best_peer"]) == (10.0, 500.0, 0.5, 2.5)
    assert found["peers"]["fast"]["us"] == 25.0
    assert set(ours.given) == set(slow.given) == {(1,), (2,), (3,)}
    assert set(fast.given) == {(-1,), (-2,), (-3,)}, "what it prepared, not what it was given"
    assert graphs == [20, 20, 20]


def test_flop_are_what_counts_where_there_are_any(graphs: list[int]) -> None:
    case = Case(name="x", make=lambda: (), run=Work(10.0), size_bytes=1, flop=500_000_000)
    assert measure(case, LIMITS) == {"us": 10.0, "tflop_s": 50.0, "of_ceiling": 0.5}


def test_a_peer_that_cannot_is_told_and_ours_stays(graphs: list[int]) -> None:
    def fails(*inputs: Any) -> None:
        raise RuntimeError("no kernel image\nfor this device")

    found = measure(Case(name="x", make=lambda: (), run=Work(1.0), size_bytes=1, peers={"it": fails}), LIMITS)
    assert found["peers"] == {"it": {"error": "no kernel image"}}
    assert "of_best_peer" not in found


@pytest.mark.parametrize(("us", "calls"), [(0.0, 20), (1.0, 20), (2000.0, 20), (4000.0, 10), (39_000.0, 1), (1e6, 1)])
def test_long_calls_are_fewer_and_never_none(us: float, calls: int) -> None:
    assert calls_within(us) == calls
    assert len(calls_over(print, [(1,), (2,)], calls)) == max(2, calls)


# ---- attention by others: fakes of their packages compute from what they are given ------------


def attend(
    q: Tensor, k_NBGD: Tensor, v_NBGD: Tensor, lengths: Sequence[int], blocks: Sequence[Sequence[int]]
) -> Tensor:
    """One new token a row, [R, H, D], from blocks [N, B, G, D]."""
    found = []
    for row, (length, own) in enumerate(zip(lengths, blocks, strict=True)):
        k, v = (pages[list(own)].flatten(0, 1)[:length].double() for pages in (k_NBGD, v_NBGD))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("hd,lhd->hl", q[row].double(), k) * q.shape[2] ** -0.5
        found.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v))
    return torch.stack(found)


def step_of(rows: Sequence[tuple[int, int]]) -> PagedStep:
    return paged_step(rows, heads=(4, 2), head_dim=16, block_tokens=5, like=torch.empty(0))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    flash, infer = ModuleType("flash_attn_interface"), ModuleType("flashinfer")

    def with_cache(
        q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, page_table: Tensor, causal: bool
    ) -> Tensor:
        lengths = cache_seqlens.tolist()
        used = [row[: -(-length // k.shape[1])] for row, length in zip(page_table.tolist(), lengths, strict=True)]
        return attend(q[:, 0], k, v, lengths, used)[:, None]

    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str) -> None:
            assert layout == "HND"

        def plan(
            self,
            indptr: Tensor,
            indices: Tensor,
            last: Tensor,
            heads: int,
            kv_heads: int,
            dim: int,
            size: int,
            **kw: Any,
        ) -> None:
            assert (heads, kv_heads, dim) == (4, 2, 16)
            at = indptr.tolist()
            self.blocks = [indices.tolist()[begin:end] for begin, end in pairwise(at)]
            tails = last.tolist()
            self.lengths = [(len(own) - 1) * size + tail for own, tail in zip(self.blocks, tails, strict=True)]

        def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
            return attend(q, pages[0].transpose(1, 2), pages[1].transpose(1, 2), self.lengths, self.blocks)

    flash.flash_attn_with_kvcache = with_cache  # type: ignore[attr-defined]
    infer.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash)
    monkeypatch.setitem(sys.modules, "flashinfer", infer)
    monkeypatch.setattr(peers, "_has", lambda module: module in sys.modules)
    monkeypatch.setattr(peers, "_WORKSPACE", 1)


def test_other_projects_attend_to_the_same_rows_as_ours(installed: None) -> None:
    made = step_of([(0, 1), (4, 1), (5, 1), (23, 1)])
    wanted = exact(made, AttentionParams(16**-0.5))
    found = peers.decode_peers()
    assert set(found) == {"flash_attn 3", "flashinfer"}
    for name, peer in found.items():
        out = peer.run(*peer.prepare(made, torch.empty(0)))
        assert isinstance(out, Tensor)
        torch.testing.assert_close(out.reshape(wanted.shape), wanted, msg=name)


def test_torch_attends_to_a_prompt_as_ours_does() -> None:
    made = step_of([(0, 9)])
    out = peers.prompt_peers()["torch"](made, torch.empty(0))
    assert isinstance(out, Tensor)
    wanted = exact(made, AttentionParams(16**-0.5))
    torch.testing.assert_close(out[0].transpose(0, 1).double(), wanted, atol=1e-5, rtol=1e-5)


def test_what_is_not_installed_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_has", lambda module: False)
    assert set(peers.prompt_peers()) == {"torch"}
    assert peers.decode_peers() == {}


# ---- sparse layers by transformers ------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5])
def test_transformers_forms_compute_the_layer_that_ours_computes_and_are_the_forms_that_are_named(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    small = (4, 2, 32, 16)
    monkeypatch.setattr(moe_bench, "_QWEN", small)
    layer = moe_bench.make_experts(torch.device("cpu"), small)
    x = torch.randn(tokens, small[2], dtype=torch.bfloat16)
    ours = moe_bench._ours(layer, MoeWorkspace(layer, max_tokens=tokens), x).total()
    taken: list[str] = []
    for form in ("batched_mm", "grouped_mm"):
        whole = ALL_EXPERTS_FUNCTIONS[form]

        def noted(*arguments: Any, form: str = form, whole: Any = whole, **named: Any) -> Any:
            taken.append(form)
            return whole(*arguments, **named)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, form, noted)
    theirs = moe_bench._peers(layer, tokens)
    assert set(theirs) == {"transformers batched_mm", "transformers grouped_mm"}
    for name, run in theirs.items():
        found: Any = run(x)
        found = found[0] if isinstance(found, tuple) else found
        assert taken.pop() == name.split()[1]
        difference = (found.reshape(ours.shape).double() - ours.double()).norm() / ours.double().norm()
        assert difference < 0.03, name
