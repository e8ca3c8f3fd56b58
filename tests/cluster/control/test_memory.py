from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diptych.cluster.config import DEFAULT_MODEL, load_config
from diptych.cluster.control.cluster import NO_BFLOAT16, engine_specs
from diptych.cluster.control.memory import MIB, plan_memory
from diptych.cluster.models import ModelFacts, ModelFolder
from diptych.protos.errors import StartupError
from diptych.protos.types import Role

FACTS = ModelFacts(
    name="m",
    architecture="LlamaForCausalLM",
    layers=30,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_context_tokens=8192,
    weights_bytes=1,
    num_parameters=100 * MIB,
    eos_token_ids=(2,),
    bos_token_id=1,
    dtype="bfloat16",
    chat_template=None,
)


def folders(*names: str) -> dict[str, ModelFolder]:
    return {name: ModelFolder(Path("/m"), dataclasses.replace(FACTS, name=name)) for name in names}


def test_the_plan_counts_weights_arena_and_ring_of_every_engine() -> None:
    config = load_config(None, [f"models.{DEFAULT_MODEL}.dtype=float32", f"models.{DEFAULT_MODEL}.decode.engines=2"])
    plan = plan_memory(engine_specs(config, folders(DEFAULT_MODEL), Path("/r")), (10_000 * MIB, "free memory"), True)
    assert [row.name for row in plan.rows] == ["prefill-0", "decode-0", "decode-1", "router", "ray"]
    prefill, decode = plan.rows[:2]
    assert prefill.weights == decode.weights == 400 * MIB
    assert 511 * MIB < prefill.arena <= 512 * MIB
    assert (prefill.ring, decode.ring) == (64 * MIB, 0)
    plan.check()
    for word in ("weights", "KV arena", "decode-1", "10,000 MiB"):
        assert word in plan.table()


def test_too_little_memory_is_refused_with_numbers_and_a_remedy() -> None:
    specs = engine_specs(load_config(), folders(DEFAULT_MODEL), Path("/r"))
    plan = plan_memory(specs, (1000 * MIB, "the memory limit of the container (cgroup)"), False)
    with pytest.raises(
        StartupError, match=r"the plan needs \d+ MiB and the memory limit .* is 1000 MiB.*kv\.memory_mib"
    ):
        plan.check()


def test_dtype_auto_follows_the_cpu_and_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype, degraded in ((True, "bfloat16", ()), (False, "float32", (NO_BFLOAT16,))):
        monkeypatch.setattr("diptych.cluster.control.host.has_native_bfloat16", lambda native=native: native)
        for spec in engine_specs(load_config(), folders(DEFAULT_MODEL), Path("/r")):
            assert (spec.dtype, spec.degraded) == (dtype, degraded)


def test_engines_of_several_models_have_different_ids() -> None:
    config = load_config(None, ["models.other.source=/m", "models.other.prefill.engines=2"])
    specs = engine_specs(config, folders(DEFAULT_MODEL, "other"), Path("/r"))
    assert [(spec.engine_id, spec.model) for spec in specs] == [
        ("prefill-0", DEFAULT_MODEL),
        ("decode-0", DEFAULT_MODEL),
        ("prefill-1", "other"),
        ("prefill-2", "other"),
        ("decode-1", "other"),
    ]
    assert all(len(spec.roles) == 1 for spec in specs)
    assert {spec.ref.target for spec in specs if Role.PREFILL in spec.roles} == {
        "unix:/r/prefill-0-0.sock",
        "unix:/r/prefill-1-0.sock",
        "unix:/r/prefill-2-0.sock",
    }
