"""Which task a model gets: its folder's, unless the configuration names one that it can have.

Guards: a causal model that is asked to rank by a head that it has not; an encoder that is started to generate.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diptych.cluster.config import DiptychConfig, ModelSettings, check_config
from diptych.cluster.control.cards import Cards
from diptych.cluster.control.plan import ClusterPlan, plan_cluster
from diptych.cluster.control.testing import FACTS
from diptych.cluster.models import ModelFolder
from diptych.cluster.security import names_of
from diptych.cluster.tasks import settle_tasks, text_facts
from diptych.protos.errors import StartupError
from diptych.protos.types import Role

CONFIG = '{"architectures": ["BertModel"], "hidden_size": 8, "max_position_embeddings": 64, "num_labels": 1}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(CONFIG)
    return tmp_path


def folder(path: Path, architecture: str) -> ModelFolder:
    tasks = {"BertModel": "embed", "LlamaForCausalLM": "generate", "BertForSequenceClassification": "rerank"}
    task = tasks[architecture]
    return ModelFolder(path, dataclasses.replace(FACTS, architecture=architecture, task=task))  # type: ignore[arg-type]


def config(**model: object) -> DiptychConfig:
    return check_config({"models": {"m": model}}, "test")


def settled(path: Path, architecture: str, **model: object) -> ModelSettings:
    return settle_tasks(config(**model), {"m": folder(path, architecture)}).models["m"]


def planned(path: Path, architecture: str, **model: object) -> ClusterPlan:
    present = Cards(cards=(), why_none="none here")
    return plan_cluster(config(**model), {"m": folder(path, architecture)}, path, present=present)


@pytest.mark.parametrize(
    ("architecture", "wanted", "got"),
    [
        ("BertModel", "auto", "embed"),
        ("LlamaForCausalLM", "auto", "generate"),
        ("LlamaForCausalLM", "embed", "embed"),
        ("BertForSequenceClassification", "auto", "rerank"),
        ("BertForSequenceClassification", "embed", "embed"),
    ],
)
def test_the_task_is_the_folders_unless_another_is_named(architecture: str, wanted: str, got: str, path: Path) -> None:
    assert settled(path, architecture, task=wanted).task == got


@pytest.mark.parametrize(("architecture", "wanted"), [("BertModel", "generate"), ("LlamaForCausalLM", "rerank")])
def test_a_task_that_a_model_cannot_have_is_refused(architecture: str, wanted: str, path: Path) -> None:
    with pytest.raises(StartupError, match=f"models.m.task is {wanted}"):
        settled(path, architecture, task=wanted)


def test_the_configurations_word_wins_over_the_folders(path: Path) -> None:
    one = folder(path, "BertModel")
    settings = settled(path, "BertModel", embed={"pooling": "cls", "normalize": False, "max_tokens": 16})
    facts = text_facts("m", settings, one)
    assert facts is not None
    assert (facts.pooling, facts.normalize, facts.max_tokens) == ("cls", False, 16)
    with pytest.raises(StartupError, match="64"):
        text_facts("m", settled(path, "BertModel", embed={"max_tokens": 65}), one)
    ranker = settled(path, "BertForSequenceClassification", embed={"pooling": "cls"})
    with pytest.raises(StartupError, match="pooling"):
        text_facts("m", ranker, folder(path, "BertForSequenceClassification"))
    assert text_facts("m", settled(path, "LlamaForCausalLM"), one) is None


@pytest.mark.parametrize(
    ("architecture", "keys", "told"),
    [
        ("BertModel", {"kv": {"memory_mib": 4}, "decode": {"engines": 2}}, "decode, kv do nothing"),
        ("BertModel", {"tool_format": "none"}, "tool_format does nothing"),
        ("LlamaForCausalLM", {"embed": {"engines": 2}}, "embed does nothing for a model that generates"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(
    architecture: str, keys: dict[str, object], told: str, path: Path
) -> None:
    with pytest.raises(StartupError, match=told):
        settled(path, architecture, **keys)


def test_a_plan_has_one_pool_without_kv_in_float32(path: Path) -> None:
    plan = planned(path, "BertModel", embed={"engines": 3})
    engines = plan.engines()
    assert [engine.engine_id for engine in engines] == ["embed-0", "embed-1", "embed-2"]
    for engine in engines:
        assert (engine.roles, engine.possible_roles, engine.dtype) == ({Role.EMBED}, {Role.EMBED}, "float32")
        assert engine.text is not None
        assert not engine.degraded
    assert planned(path, "BertModel", dtype="bfloat16").engines()[0].dtype == "bfloat16"


def test_more_engines_are_the_same_plan_of_another_size(path: Path) -> None:
    one, three = (planned(path, "BertModel", embed={"engines": number}).pools[0] for number in (1, 3))
    assert one.template == three.template


def test_its_processes_have_names_of_their_own(path: Path) -> None:
    named = settle_tasks(config(), {"m": folder(path, "BertModel")})
    assert names_of(named) == ["router", "embed"]


def test_the_echo_model_embeds_nothing() -> None:
    with pytest.raises(StartupError, match="echo"):
        config(source="echo", task="embed")
