"""A plan in the store comes back equal: a restarted manager that saw a difference would replace every engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from diptych.cluster.config import load_config
from diptych.cluster.control.kept import kept_form
from diptych.cluster.control.plan import PLAINTEXT, ClusterPlan, plan_cluster
from diptych.cluster.models import ModelFacts, ModelFolder

FACTS = ModelFacts(
    name="tiny",
    architecture="LlamaForCausalLM",
    layers=2,
    kv_heads=2,
    head_dim=8,
    vocab_size=1000,
    max_context_tokens=512,
    weights_bytes=10,
    num_parameters=5,
    eos_token_ids=(1, 2),
    bos_token_id=None,
    dtype="float32",
    chat_template="{{ 'a' }}",
)


def plan_of(*overrides: str) -> ClusterPlan:
    config = load_config(overrides=overrides)
    folders = dict.fromkeys(config.models, ModelFolder(Path("/models/tiny"), FACTS))
    return plan_cluster(config, folders, Path("/run/d"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("models.a.seed=3", "models.a.prefill.kv={memory_mib: 7}", "telemetry.trace_file=/t.json", "models.b={}"),
        ("security.tls={ca: /a, cert: /b, key: /c}", "engines.host='::1'", "security.secret_file=/s"),
    ],
)
def test_a_plan_comes_back_equal(overrides: tuple[str, ...]) -> None:
    plan = plan_of(*overrides).with_secret("0123abcd")
    kept = ("owner", plan, plan.pools[:1])
    assert kept_form().validate_json(kept_form().dump_json(kept)) == kept
    assert kept_form().validate_json(kept_form().dump_json(("", None, ()))) == ("", None, ())


def test_another_secret_is_another_plan_and_the_same_one_is_not() -> None:
    assert plan_of().with_secret("a") == plan_of().with_secret("a")
    assert plan_of().with_secret("a") != plan_of().with_secret("b")


def test_what_leaves_the_machine_in_plaintext_is_told() -> None:
    open_plan = plan_of("engines.host=10.0.0.1", "security.allow_plaintext=true")
    assert all(PLAINTEXT in engine.degraded for engine in open_plan.engines())
    for safe in (
        plan_of("engines.host=127.0.0.1", "security.allow_plaintext=true"),
        plan_of("engines.host=10.0.0.1", "security.allow_plaintext=true", "security.tls={ca: /a, cert: /b, key: /c}"),
    ):
        assert not any(PLAINTEXT in engine.degraded for engine in safe.engines())


def test_an_address_becomes_a_target() -> None:
    (prefill, _) = plan_of("engines.host='::1'").engines()
    assert prefill.ref.target == "[::1]:0"
    (prefill, _) = plan_of("engines.host=127.0.0.1").engines()
    assert prefill.ref.target == "127.0.0.1:0"
