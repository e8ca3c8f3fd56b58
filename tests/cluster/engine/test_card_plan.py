"""What a card must hold is known, told and judged from a spec and a config.json, before anything is loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diptych.cluster.bench.shapes import SHAPES, write_shape
from diptych.cluster.config import ModelSettings
from diptych.cluster.control.cards import Card
from diptych.cluster.engine.card_plan import (
    CONTEXT,
    card_bytes,
    card_plans,
    check_card,
    least_tokens,
    num_weights,
    plan_card,
)
from diptych.cluster.engine.spec import EngineSpec
from diptych.kernels.device.memory_plan import GIB
from diptych.kernels.models.shape import read_shape
from diptych.kernels.models.tensors import weights_bytes
from diptych.protos.errors import StartupError
from diptych.protos.settings import DecodePoolSettings, KvSettings, TransferSettings
from diptych.protos.types import EngineId, Role

H200 = 139 * GIB


def make_spec(folder: Path, shape: str = "llama-8b", **settings: object) -> EngineSpec:
    model = write_shape(shape, folder)
    chosen = {"source": shape, "layout": "colocated", "device": "cuda", **settings}
    return EngineSpec(
        engine_id=EngineId("decode-0"),
        epoch=1,
        roles=frozenset({Role.DECODE}),
        model="m",
        settings=ModelSettings(**chosen),  # type: ignore[arg-type]
        transfer=TransferSettings(),
        folder=model.path,
        facts=model.facts,
        dtype="bfloat16",
        run_dir=folder,
    )


def row(table: str, name: str) -> float:
    [line] = [line for line in table.splitlines() if line.startswith(name)]
    return float(line[36:46])


def test_the_table_has_every_part_and_kv_gets_what_they_leave(tmp_path: Path) -> None:
    plan = plan_card(make_spec(tmp_path), H200)
    table = plan.table()
    assert row(table, "weights") == pytest.approx(14.96, abs=0.01)
    assert 0.5 < row(table, "steps of 8,192 tokens") < 1.5
    assert row(table, "logits of 512 rows") == pytest.approx(512 * 128256 * 6 / GIB, abs=0.01)
    assert 0.3 < row(table, "state of sequences") < 0.45
    assert "graphs" in table
    assert "reserve" in table
    assert plan.num_blocks * 16 > 900_000
    check_card(make_spec(tmp_path), plan)


def test_sparse_models_plan_for_their_pairs(tmp_path: Path) -> None:
    table = plan_card(make_spec(tmp_path, "qwen3-30b-a3b"), H200).table()
    assert row(table, "weights") == pytest.approx(56.9, abs=0.3)
    assert 0.5 < row(table, "steps of 8,192 tokens") < 1.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
        SHAPES["qwen3-30b-a3b"] | {"mlp_only_layers": [0, 3]},
    ],
)
def test_weights_are_counted_as_they_are_allocated(changes: dict[str, object]) -> None:
    shape = read_shape(SHAPES["llama-8b"] | changes)
    assert num_weights(shape) * 2 == weights_bytes(shape, torch.bfloat16)


def test_a_model_of_an_unknown_family_is_planned_by_its_width(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    known = row(plan_card(spec, H200).table(), "steps of")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "OtherForCausalLM"))
    assert 0.5 * known < row(plan_card(spec, H200).table(), "steps of") < 2 * known


@pytest.mark.parametrize(
    ("free_gib", "settings", "advice"),
    [
        (139.0, {"kv": KvSettings(memory_mib=200 << 10)}, r"models\.m\.kv\.memory_mib: (\d+) \(KV of"),
        (18.5, {}, r"models\.m\.max_context_tokens: 4096 \(KV of"),
        (18.5, {}, r"models\.m\.decode\.max_running: (\d+) \(KV of"),
        (18.5, {}, r"models\.m\.decode\.step_tokens: (\d+) \(KV of"),
        (16.45, {}, r"max_context_tokens: 4096, decode\.max_running: 16 and decode\.step_tokens: 512 together"),
        (10.0, {}, "choose a smaller model"),
    ],
)
def test_a_refusal_says_what_is_missing_and_settings_that_fit(
    tmp_path: Path, free_gib: float, settings: dict[str, object], advice: str
) -> None:
    spec = make_spec(tmp_path, **settings)
    plan = plan_card(spec, int(free_gib * GIB))
    with pytest.raises(StartupError, match=advice) as refusal:
        check_card(spec, plan)
    message = str(refusal.value)
    missing = float(re.search(r"card: ([\d.]+) GiB are missing", message)[1])  # type: ignore[index]
    assert missing == pytest.approx(plan.missing(least_tokens(spec)) / GIB, abs=0.01)
    assert "memory plan of the card (GiB)" in message, "with the plan"


@pytest.mark.parametrize("free_gib", [16.45, 16.9, 17.3, 18.5])
def test_what_a_refusal_advises_is_accepted(tmp_path: Path, free_gib: float) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(StartupError) as refusal:
        check_card(spec, plan_card(spec, int(free_gib * GIB)))
    advised = re.search(r"would fit: (.*?) \(KV", str(refusal.value))
    assert advised is not None
    decode: dict[str, int] = {}
    context = None
    for key, value in re.findall(r"(max_context_tokens|max_running|step_tokens): (\d+)", advised[1]):
        if key == "max_context_tokens":
            context = int(value)
        else:
            decode[key] = int(value)
    other = make_spec(tmp_path, max_context_tokens=context, decode=DecodePoolSettings(**decode))
    check_card(other, plan_card(other, int(free_gib * GIB)))


def test_an_engine_with_half_a_card_plans_for_half_of_it(tmp_path: Path) -> None:
    half = make_spec(tmp_path, gpu_share=0.5)
    assert card_bytes(half, free=140 * GIB, total=140 * GIB) == 70 * GIB
    assert card_bytes(half, free=30 * GIB, total=140 * GIB) == 30 * GIB, "somebody else has the rest"
    assert card_bytes(make_spec(tmp_path), free=139 * GIB, total=140 * GIB) == 139 * GIB


def test_cards_are_told_before_anything_starts_by_the_emptiest_one(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    small, large = Card("small", 24 * GIB, 9 * GIB), Card("large", 141 * GIB, 140 * GIB)
    [table] = card_plans([spec], [small, large])
    assert table.startswith("memory plan of decode-0 on one large (GiB)")
    assert f"of {(140 * GIB - CONTEXT) / GIB:.2f}" in table
    with pytest.raises(StartupError, match="does not fit on the card"):
        card_plans([spec], [small])
    assert card_plans([spec], []) == []
    assert card_plans([spec], [Card("MIG-1")]) == [], "of which nobody knows the size: the engine will find out"
    assert card_plans([make_spec(tmp_path, device="cpu")], [large]) == []


def test_planning_loads_no_torch() -> None:
    code = "import sys, diptych.cluster.engine.card_plan; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert not {"torch", "transformers", "triton", "ray"} & set(done.stdout.split())
