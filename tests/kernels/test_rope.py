"""Frequencies that depend on a request's length: no row may mix them, and within the limit all is transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.cluster.models.facts import _context_tokens, _Sizes
from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.ops.ragged import Segment, build_batch
from diptych.kernels.runner import ModelRunner
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.protos.step import StepPlan, StepRow

ORIGINAL = 24  # positions; the model has 96
BLOCK_TOKENS = 4
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [4.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 longrope": (
        "phi3",
        {
            "max_position_embeddings": 96,
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": LONGROPE,
            "pad_token_id": 0,
        },
    ),
    "llama longrope": ("llama", {"max_position_embeddings": 96, "rope_parameters": LONGROPE}),
    "llama dynamic": ("llama", {"max_position_embeddings": ORIGINAL, "rope_parameters": DYNAMIC}),
}


@pytest.fixture(params=MODELS, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, sizes = MODELS[request.param]
    return make_tiny_checkpoint(tmp_path_factory.mktemp("rope") / "model", model_type, **sizes)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32")


def new_kv(model: LoadedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shape = (40, model.kv_heads, BLOCK_TOKENS, model.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.layers)]


def ids(length: int) -> torch.Tensor:
    return torch.arange(length) * 7 % 500 + 3


def test_the_context_ends_where_the_frequencies_would_change(model: LoadedModel) -> None:
    assert model.max_context_tokens == ORIGINAL
    shortened = [reason for reason in model.degraded if "context of 24 tokens instead of 96" in reason]
    assert len(shortened) == ("longrope" in str(model.module.config.rope_parameters))


def test_requests_of_every_length_in_one_row_equal_transformers_for_each_alone(
    folder: Path, model: LoadedModel
) -> None:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    reference = load(folder, dtype=torch.float32)
    lengths = (1, ORIGINAL, 5, ORIGINAL - 1)
    segments, first, block = [], 0, 0
    for length in lengths:
        count = -(-length // BLOCK_TOKENS)
        segments.append(Segment(first, length, 0, range(block, block + count)))
        first, block = first + length, block + count
    batch = build_batch(segments, BLOCK_TOKENS, torch.device("cpu"))
    kv = dict(zip(model.layer_ids, new_kv(model), strict=True))
    with torch.inference_mode():
        row = torch.cat([ids(length) for length in lengths])
        logits = model.forward(row, batch, kv, torch.arange(first)).split(lengths)
        for length, mine in zip(lengths, logits, strict=True):
            torch.testing.assert_close(mine, reference(ids(length)[None]).logits[0], atol=2e-4, rtol=2e-4)


def test_a_row_past_the_limit_is_refused_whole_and_changes_nothing_for_others(model: LoadedModel) -> None:
    """The other side of the limit would change every row's frequencies, and those of all cached prefixes."""

    def row(slot: int, start: int, num_tokens: int) -> StepRow:
        tokens = tuple(ids(start + num_tokens)[start:].tolist())
        return StepRow(
            slot=slot,
            num_tokens=num_tokens,
            tokens=tokens,
            start=start,
            blocks=range(8 * slot, 8 * slot + 8),
            sample=None,
        )

    def keys_after(plans: list[tuple[StepRow, ...]]) -> torch.Tensor:
        kv = new_kv(model)
        runner = ModelRunner(model, kv, block_tokens=BLOCK_TOKENS, max_slots=4, max_step_tokens=64)
        for step, rows in enumerate(plans):
            if any(each.start + each.num_tokens > ORIGINAL for each in rows):
                with pytest.raises(AssertionError, match="beyond the model's context"):
                    runner.launch(StepPlan(step, rows))
            else:
                runner.launch(StepPlan(step, rows))
                runner.collect()
        return torch.stack([k for k, _ in kv])

    within = [(row(0, 0, 20),), (row(0, 20, 4),)]
    mixed = [within[0], (row(1, 0, ORIGINAL + 1), row(0, 20, 1)), within[1]]
    assert torch.equal(keys_after(within), keys_after(mixed))


def test_the_cluster_reads_the_same_limit_from_the_configuration() -> None:
    def limit(**config: Any) -> int:
        return _context_tokens(_Sizes(Path("config.json"), {"max_position_embeddings": 96, **config}))

    assert limit(rope_parameters=LONGROPE) == ORIGINAL
    assert limit(rope_scaling={"type": "su"}, original_max_position_embeddings=ORIGINAL) == ORIGINAL
    assert limit(rope_parameters=DYNAMIC) == limit(rope_scaling=None) == limit() == 96
