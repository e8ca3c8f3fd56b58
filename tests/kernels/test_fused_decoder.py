"""The fused decoder computes what transformers' forward does, or is not used."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.kernels.attention import AttentionStep, Compute, run_module
from diptych.kernels.layers.fused_decoder import FAMILIES, FusedDecoder
from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.ops.ragged import Segment, build_batch
from diptych.kernels.testing import ARCHITECTURES, make_tiny_checkpoint

FUSED = ("llama", "mistral", "qwen2", "qwen3")
BLOCK_TOKENS = 4


def two_steps(model: LoadedModel, compute: Compute) -> Tensor:
    """Logits of a mixed row, then of another behind it: prompts, chunks and single tokens, longer than any window."""
    shape = (40, model.kv_heads, BLOCK_TOKENS, model.head_dim)
    dtype = getattr(torch, model.dtype)
    kv = {layer: (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for layer in model.layer_ids}
    blocks = [range(10 * i, 10 * i + 10) for i in range(4)]
    steps = (((0, 13), (0, 1), (0, 6), (0, 13)), ((13, 1), (1, 4), (6, 1), (13, 17)))
    logits = []
    for step in steps:
        segments, first = [], 0
        for (start, num), own in zip(step, blocks, strict=True):
            segments.append(Segment(first, num, start, own))
            first += num
        batch = build_batch(segments, BLOCK_TOKENS, torch.device("cpu"))
        ids = (torch.arange(first) * 31 + len(logits)) % 509
        logits.append(compute(ids, AttentionStep(batch, kv), torch.arange(0, first, 2)))
    return torch.cat(logits)


@pytest.mark.parametrize("name", FUSED)
def test_logits_equal_those_of_transformers_forward_in_ragged_rows(name: str, tmp_path: Path) -> None:
    model = load_model(ARCHITECTURES[name].make(tmp_path / "model"), dtype="float32")
    assert isinstance(model.compute, FusedDecoder)
    assert model.degraded == ()
    with torch.inference_mode():
        wanted = two_steps(model, partial(run_module, model.module))
        torch.testing.assert_close(two_steps(model, model.compute), wanted, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_as_near_to_float32_as_transformers_own_bfloat16(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=4)
    exact, rounded = (load_model(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert isinstance(rounded.compute, FusedDecoder)
    with torch.inference_mode():
        wanted = two_steps(exact, exact.compute)
        mine = (two_steps(rounded, rounded.compute).float() - wanted).norm()
        theirs = (two_steps(rounded, partial(run_module, rounded.module)).float() - wanted).norm()
    assert mine <= 1.25 * theirs


def test_only_the_listed_families_are_fused(tmp_path: Path) -> None:
    for name in ("gemma2", "gpt2"):
        model = load_model(ARCHITECTURES[name].make(tmp_path / name), dtype="float32")
        assert not isinstance(model.compute, FusedDecoder)
        assert type(model.module).__name__ not in FAMILIES


@pytest.mark.parametrize("sizes", [{"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "llama3"}}])
def test_variants_of_a_family_are_fused_only_where_they_are_understood(sizes: dict[str, Any], tmp_path: Path) -> None:
    if "rope_parameters" in sizes:
        factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope = sizes["rope_parameters"] | factors | {"rope_theta": 1e4, "original_max_position_embeddings": 64}
        sizes = {"rope_parameters": rope}
    model = load_model(make_tiny_checkpoint(tmp_path / "model", **sizes), dtype="float32")
    assert isinstance(model.compute, FusedDecoder) == ("rope_parameters" in sizes)
    with torch.inference_mode():
        wanted = two_steps(model, partial(run_module, model.module))
        torch.testing.assert_close(two_steps(model, model.compute), wanted, atol=1e-4, rtol=1e-4)


def test_a_layer_that_does_something_else_keeps_transformers_forward_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.forward

    def doubled(self: nn.Module, x: Tensor) -> Tensor:
        return original(self, x) * 2

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", doubled)
    model = load_model(make_tiny_checkpoint(tmp_path / "model"), dtype="float32")
    assert not isinstance(model.compute, FusedDecoder)
    assert [reason for reason in model.degraded if "runs through transformers' forward" in reason]
