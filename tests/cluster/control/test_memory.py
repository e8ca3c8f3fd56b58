from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diptych.cluster.config import DEFAULT_MODEL, load_config
from diptych.cluster.control.memory import MIB, check_more, engine_bytes, plan_memory
from diptych.cluster.control.plan import NO_BFLOAT16, NO_SHM, plan_cluster
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
    plan = plan_memory(
        plan_cluster(config, folders(DEFAULT_MODEL), Path("/r")).engines(), (10_000 * MIB, "free memory"), True
    )
    assert [row.name for row in plan.rows] == ["prefill-0", "decode-0", "decode-1", "router", "ray"]
    prefill, decode = plan.rows[:2]
    assert prefill.weights == decode.weights == 400 * MIB
    assert 511 * MIB < prefill.arena <= 512 * MIB
    assert (prefill.ring, decode.ring) == (64 * MIB, 0)
    plan.check()
    for word in ("weights", "KV arena", "decode-1", "10,000 MiB"):
        assert word in plan.table()


def test_too_little_memory_is_refused_with_numbers_and_a_remedy() -> None:
    specs = plan_cluster(load_config(), folders(DEFAULT_MODEL), Path("/r")).engines()
    plan = plan_memory(specs, (1000 * MIB, "the memory limit of the container (cgroup)"), False)
    with pytest.raises(
        StartupError, match=r"the plan needs \d+ MiB and the memory limit .* is 1000 MiB.*kv\.memory_mib"
    ):
        plan.check()


def test_dtype_auto_follows_the_cpu_and_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype, degraded in ((True, "bfloat16", ()), (False, "float32", (NO_BFLOAT16,))):
        monkeypatch.setattr("diptych.cluster.control.host.has_native_bfloat16", lambda native=native: native)
        for spec in plan_cluster(load_config(), folders(DEFAULT_MODEL), Path("/r")).engines():
            assert (spec.dtype, spec.degraded) == (dtype, degraded)


def test_engines_of_several_models_have_different_ids() -> None:
    config = load_config(None, ["models.other.source=/m", "models.other.prefill.engines=2"])
    specs = plan_cluster(config, folders(DEFAULT_MODEL, "other"), Path("/r")).engines()
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


def colocated(*more: str) -> list[str]:
    return [f"models.{DEFAULT_MODEL}.layout=colocated", *more]


def test_colocated_launches_decode_engines_alone_and_gives_them_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    [lone] = plan_cluster(load_config(None, colocated()), folders(DEFAULT_MODEL), Path("/r")).engines()
    assert (lone.engine_id, lone.roles, lone.threads) == ("decode-0", {Role.DECODE}, 8)
    two = load_config(None, colocated(f"models.{DEFAULT_MODEL}.decode.engines=2"))
    assert [spec.threads for spec in plan_cluster(two, folders(DEFAULT_MODEL), Path("/r")).engines()] == [4, 4]
    plan = plan_memory([lone], (10_000 * MIB, "free memory"), True)
    assert [(row.name, row.ring) for row in plan.rows] == [("decode-0", 0), ("router", 0), ("ray", 0)]


def test_each_pool_may_have_an_arena_of_its_own() -> None:
    config = load_config(
        None,
        [
            f"models.{DEFAULT_MODEL}.dtype=float32",
            f"models.{DEFAULT_MODEL}.kv.memory_mib=256",
            f"models.{DEFAULT_MODEL}.prefill.kv={{memory_mib: 64, block_tokens: 32}}",
        ],
    )
    prefill, decode = plan_cluster(config, folders(DEFAULT_MODEL), Path("/r")).engines()
    assert (prefill.kv.memory_mib, prefill.kv.block_tokens) == (64, 32)
    assert (decode.kv.memory_mib, decode.kv.block_tokens) == (256, 16)
    assert prefill.kv_key == f"models.{DEFAULT_MODEL}.prefill.kv"
    assert decode.kv_key == f"models.{DEFAULT_MODEL}.kv"
    rows = plan_memory([prefill, decode], (10_000 * MIB, "free memory"), False).rows
    assert 60 * MIB < rows[0].arena <= 64 * MIB
    assert 250 * MIB < rows[1].arena <= 256 * MIB


def test_a_model_that_does_not_fit_is_named_with_its_key_and_the_numbers() -> None:
    config = load_config(None, ["models.big.source=/m", "models.big.decode.kv.memory_mib=9000"])
    plan = plan_memory(
        plan_cluster(config, folders(DEFAULT_MODEL, "big"), Path("/r")).engines(), (8000 * MIB, "free memory"), True
    )
    with pytest.raises(StartupError, match=r"needs \d+ MiB .* 8000 MiB.* lower models\.big\.decode\.kv\.memory_mib"):
        plan.check()


def test_more_engines_are_refused_with_numbers_when_the_memory_does_not_suffice() -> None:
    spec, _ = plan_cluster(load_config(), folders(DEFAULT_MODEL), Path("/r")).engines()
    seen: list[object] = []

    def available(pids: object) -> tuple[int, str]:
        seen.append(pids)
        return 3000 * MIB, "free memory of the machine"

    check_more(spec, 1, engine_bytes(spec), [7], available)
    assert seen == [[7]]
    with pytest.raises(
        StartupError, match=r"for 2 more engines of \d+ MiB.*needs \d+ MiB.*machine with what they hold is 3000 MiB"
    ):
        check_more(spec, 2, engine_bytes(spec), [7], available)


def test_a_forced_transport_is_told_as_degraded_where_there_is_a_transfer() -> None:
    forced = ["transfer.transport=grpc"]
    for overrides, told in ((forced, True), (colocated(*forced), False), ([], False)):
        specs = plan_cluster(load_config(None, overrides), folders(DEFAULT_MODEL), Path("/r")).engines()
        assert all((NO_SHM in spec.degraded) is told for spec in specs)
