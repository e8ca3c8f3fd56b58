"""What a folder's files say about texts is taken at their word, or refused by file and reason; nothing is guessed.

Guards: a pooling that is computed as another; a step of modules.json that is left out silently; positions that a family
does not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.models.texts import TextFacts, detect_task, read_text_facts
from diptych.protos.errors import StartupError

CONFIG = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "max_position_embeddings": 64}
STEPS = ("Transformer", "Pooling", "Normalize")


def write(folder: Path, name: str, value: object) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "config.json", CONFIG)
    modules(tmp_path, *STEPS)
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    return tmp_path


def modules(folder: Path, *steps: str) -> None:
    paths = ["" if step == "Transformer" else f"{number}_{step}" for number, step in enumerate(steps)]
    listed = [{"path": path, "type": f"x.y.{step}"} for path, step in zip(paths, steps, strict=True)]
    write(folder, "modules.json", listed)


def facts(folder: Path, task: Any = "embed") -> TextFacts:
    return read_text_facts(folder, task)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "embed"),
        ("BertForMaskedLM", "embed"),
        ("Qwen3ForCausalLM", "generate"),
        ("GPT2LMHeadModel", "generate"),
        ("Gemma3ForConditionalGeneration", "generate"),
        ("BertForSequenceClassification", "rerank"),
    ],
)
def test_a_class_tells_its_task(architecture: str, task: str, tmp_path: Path) -> None:
    assert detect_task(tmp_path, architecture) == task


def test_a_causal_model_made_for_embedding_says_so_by_its_modules(folder: Path) -> None:
    assert detect_task(folder, "Qwen3ForCausalLM") == "embed"


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({}, "mean"),
    ],
)
def test_pooling_in_both_spellings(config: dict[str, Any], pooling: str, folder: Path) -> None:
    write(folder, "1_Pooling/config.json", config)
    assert facts(folder).pooling == pooling


@pytest.mark.parametrize(
    "config",
    [{"pooling_mode_max_tokens": True}, {"pooling_mode": "weightedmean"}, {"pooling_mode": ["mean", "cls"]}],
)
def test_pooling_that_is_not_computed_is_refused(config: dict[str, Any], folder: Path) -> None:
    write(folder, "1_Pooling/config.json", config)
    with pytest.raises(StartupError, match="not computed here"):
        facts(folder)


def test_a_step_that_is_not_computed_is_refused_by_name(folder: Path) -> None:
    modules(folder, "Transformer", "Pooling", "Dense")
    with pytest.raises(StartupError, match="Dense"):
        facts(folder)


@pytest.mark.parametrize("place", ["../elsewhere", "a/b", ".hidden"])
def test_no_step_leads_out_of_the_folder(place: str, folder: Path) -> None:
    write(folder, "modules.json", [{"path": "", "type": "Transformer"}, {"path": place, "type": "Pooling"}])
    with pytest.raises(StartupError):
        facts(folder)


def test_normalisation_and_lengths(folder: Path) -> None:
    assert (facts(folder).normalize, facts(folder).max_tokens, facts(folder).dimensions) == (True, 64, 8)
    modules(folder, "Transformer", "Pooling")
    write(folder, "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True})
    write(folder, "tokenizer_config.json", {"model_max_length": 48})
    assert (facts(folder).normalize, facts(folder).max_tokens, facts(folder).lower_case) == (False, 32, True)
    write(folder, "sentence_bert_config.json", {"max_seq_length": None})
    assert facts(folder).max_tokens == 48
    write(folder, "tokenizer_config.json", {"model_max_length": 10**30})
    assert facts(folder).max_tokens == 64


def test_positions_of_a_family_that_begins_behind_its_padding(folder: Path) -> None:
    write(folder, "config.json", CONFIG | {"model_type": "xlm-roberta", "pad_token_id": 1})
    assert facts(folder).max_tokens == 62


def test_prompts(folder: Path) -> None:
    prompts = {"query": "ask: ", "document": None}
    write(folder, "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    assert (facts(folder).prompts, facts(folder).default_prompt) == ((("query", "ask: "), ("document", "")), "query")
    for wrong in (
        {"prompts": ["a"]},
        {"prompts": {"a": 1}},
        {"default_prompt_name": "other"},
        {"prompts": {"a": "x" * 5000}},
    ):
        write(folder, "config_sentence_transformers.json", wrong)
        with pytest.raises(StartupError):
            facts(folder)


def test_without_modules_the_class_decides(tmp_path: Path) -> None:
    write(tmp_path, "config.json", CONFIG)
    assert (facts(tmp_path).pooling, facts(tmp_path).normalize) == ("mean", True)
    write(tmp_path, "config.json", CONFIG | {"architectures": ["LlamaForCausalLM"]})
    assert facts(tmp_path).pooling == "last"


@pytest.mark.parametrize(
    ("own", "activation"),
    [
        ({}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
    ],
)
def test_a_ranker_and_its_activation(own: dict[str, Any], activation: str, tmp_path: Path) -> None:
    write(tmp_path, "config.json", CONFIG | {"id2label": {"0": "LABEL_0"}} | own)
    found = facts(tmp_path, "rerank")
    assert (found.task, found.dimensions, found.activation) == ("rerank", 1, activation)


def test_a_classifier_and_foreign_code_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "config.json", CONFIG | {"id2label": {"0": "a", "1": "b"}})
    with pytest.raises(StartupError, match="2 classes"):
        facts(tmp_path, "rerank")
    write(tmp_path, "config.json", CONFIG | {"num_labels": 1, "sentence_transformers": {"activation_fn": "os.system"}})
    with pytest.raises(StartupError, match="activation"):
        facts(tmp_path, "rerank")


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"])
def test_broken_files_are_named(name: str, folder: Path) -> None:
    (folder / name).write_text("{not json")
    with pytest.raises(StartupError, match=name.split("/")[-1]):
        facts(folder)
