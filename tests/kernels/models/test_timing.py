"""The steps that are timed are real ones, and both paths of a model compute the same in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diptych.kernels.attention import AttentionStep
from diptych.kernels.device.plain import ragged_batch
from diptych.kernels.model import LoadedModel, load_hand_written, load_model
from diptych.kernels.models.timing import CASES, StepCase, deterministic_cost, generic_cost, step_of
from diptych.kernels.ops.paged_attention.split import plan_splits
from diptych.kernels.testing import ARCHITECTURES, make_tiny_checkpoint

CPU = torch.device("cpu")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "mixtral")
SMALL = (StepCase(1, 40, 1), StepCase(7, 33, 1), StepCase(2, 0, 19), StepCase(3, 16, 5))


def by_hand(folder: Path, place: torch.device) -> LoadedModel:
    config = json.loads((folder / "config.json").read_text())
    return load_hand_written(folder, config, dtype="float32", place=place, random_seed=None)


def arena(model: LoadedModel, case: StepCase) -> list[tuple[Tensor, Tensor]]:
    shape = (case.rows * -(-(case.before + case.new) // 16), model.kv_heads, 16, model.head_dim)
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in model.layer_ids]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["mistral", "qwen3-moe"])
def test_a_timed_step_is_one_that_the_cpus_path_computes_alike(name: str, case: StepCase, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].make(tmp_path / "model")
    model, theirs = by_hand(folder, CPU), load_model(folder, dtype="float32")
    with torch.inference_mode():
        step = step_of(model, case, invariant=False)
        logits = torch.full((case.rows, model.vocab_size), float("nan"))
        model.decoder(max_tokens=case.rows * case.new).forward(step, arena(model, case), logits)
        kv = dict(zip(theirs.layer_ids, arena(model, case), strict=True))
        assert theirs.compute is not None
        wanted = theirs.compute(step.ids_T.long(), AttentionStep(ragged_batch(step), kv), step.kept_N)
    assert len({*step.slot_mapping_T.tolist()}) == case.rows * case.new
    torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)


def test_the_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert StepCase(2, 0, 30).name == "prompt 2 x 30"
    assert StepCase(2, 9, 30).name == "prompt 2 x 30 behind 9"
    assert StepCase(2, 9, 1).name == "decode 2 x 10"


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_both_paths_give_the_same_logits_on_a_card(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].make(tmp_path / "model")
    mine, generic = (load_model(folder, dtype="float32", device="cuda:0", by_hand=which) for which in (True, False))
    assert mine.by_hand is not None
    assert generic.by_hand is None
    with torch.inference_mode():
        for case in SMALL:
            step, found = step_of(mine, case, invariant=False), []
            for model in (mine, generic):
                kv = [(k.to("cuda:0"), v.to("cuda:0")) for k, v in arena(model, case)]
                logits = torch.full((case.rows, model.vocab_size), float("nan"), device="cuda:0")
                plan_splits(step)
                model.decoder(max_tokens=64).forward(step, kv, logits)
                found.append(logits)
            torch.testing.assert_close(found[1], found[0], atol=5e-4, rtol=5e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_what_paths_and_determinism_cost_is_told_for_every_case(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Timing does not decide; it is kept with the report."""
    tiny = ARCHITECTURES[name]
    sizes = dict(tiny.sizes) | {"max_position_embeddings": 2048, "hidden_size": 512, "head_dim": 64}
    folder = make_tiny_checkpoint(tmp_path / "model", tiny.model_type, **sizes)
    mine, generic = (load_model(folder, dtype="bfloat16", device="cuda:0", by_hand=which) for which in (True, False))
    cases = [case for case in CASES if case.before + case.new <= 2048]
    for kind, found in (("generic", generic_cost(mine, generic, cases)), ("deterministic", deterministic_cost(mine))):
        assert [one.case for one in found] == cases
        for one in found:
            assert one.ratio > 0
            record_property(f"{kind} {one.case.name}", round(one.ratio, 2))
    assert deterministic_cost(replace(mine, max_context_tokens=100)) == []
