from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer.testing

from diptych.cluster.bench.figures import quantile, spread, why_unwritable
from diptych.cluster.bench.shapes import SHAPES, shape_of, write_shape
from diptych.cluster.bench.workload import Workload, parse_workload, random_prompts, read_prompts
from diptych.cluster.cli import app
from diptych.protos.errors import StartupError


def test_a_workload_is_a_name_or_three_numbers() -> None:
    assert parse_workload("decode-64") == Workload("decode-64", 64, 128, 256)
    assert parse_workload("3x20x1") == Workload("3x20x1", 3, 20, 1)


@pytest.mark.parametrize("text", ["", "decode", "3x20", "3x20x0", "0x1x1", "-1x2x3", "1x2x3x4", "1.5x2x3", "ax2x3"])
def test_any_other_workload_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(StartupError, match="REQUESTSxINPUTxOUTPUT"):
        parse_workload(text)


@pytest.mark.parametrize("vocab_size", [2, 290, 512, 30_000, 151_936])
def test_random_prompts_are_repeatable_and_within_the_vocabulary(vocab_size: int) -> None:
    prompts = random_prompts(5, 40, vocab_size=vocab_size, seed=3)
    assert [len(prompt) for prompt in prompts] == [40] * 5
    assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)
    assert prompts == random_prompts(5, 40, vocab_size=vocab_size, seed=3)
    if vocab_size > 2:
        assert prompts != random_prompts(5, 40, vocab_size=vocab_size, seed=4)
        assert len({tuple(prompt[:16]) for prompt in prompts}) == 5, "a shared block would be a prefix hit"


def test_prompts_are_texts_or_token_ids(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": 0, "prompt": "a b", "prompt_tokens": 2}\n{"prompt": [4, 5]}\n')
    assert read_prompts(file) == ["a b", [4, 5]]
    assert read_prompts(file, lambda text: [len(text)]) == [[3], [4, 5]]


@pytest.mark.parametrize(
    "line",
    ["{", "3", "{}", '{"prompt": ""}', '{"prompt": []}', '{"prompt": [-1]}', '{"prompt": [1.5]}', '{"prompt": 3}'],
)
def test_a_bad_line_of_prompts_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(StartupError, match="line 2"):
        read_prompts(file)


def test_missing_and_empty_files_of_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot read --prompts .*none: No such file or directory$"):
        read_prompts(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"a\xff")
    with pytest.raises(StartupError, match="byte 1 is not UTF-8 text"):
        read_prompts(tmp_path / "binary")
    (tmp_path / "empty").touch()
    with pytest.raises(StartupError, match="no lines"):
        read_prompts(tmp_path / "empty")


@pytest.mark.parametrize("verb", ["offline", "serve"])
@pytest.mark.parametrize(("name", "why"), [("none/out.json", "No such file"), ("folder", "Is a directory")])
def test_a_result_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, verb: str, name: str, why: str
) -> None:
    (tmp_path / "folder").mkdir()
    work = ["--url", "http://127.0.0.1:1"] if verb == "serve" else ["--workload", "1x1x1", "--model", "/none"]
    done = typer.testing.CliRunner().invoke(app, ["bench", verb, *work, "--json", str(tmp_path / name)])
    assert done.exit_code == 2
    assert "--json" in done.stderr
    assert why in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_asking_whether_a_file_can_be_written_changes_no_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    assert why_unwritable(tmp_path / "old") == why_unwritable(tmp_path / "new") == ""
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "kept")]


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [quantile(values, part) for part in (0.0, 0.5, 0.99, 1.0)] == [1, 51, 100, 100]
    assert spread([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0, "max": 7.0}
    assert spread([]) is None


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_every_shape_as_it_is_meant(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    facts = write_shape(name, tmp_path).facts
    config = AutoConfig.from_pretrained(tmp_path)
    assert (facts.layers, facts.kv_heads, facts.head_dim) == (
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
    )
    assert (facts.vocab_size, facts.max_context_tokens) == (config.vocab_size, config.max_position_embeddings)
    assert facts.architecture == config.architectures[0]
    assert config.tie_word_embeddings is SHAPES[name]["tie_word_embeddings"]
    assert config.rope_parameters["rope_theta"] == SHAPES[name]["rope_theta"]


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": None}, {"num_attention_heads": 0}, {"vocab_size": "many"}, {"architectures": []}]
)
def test_a_shape_without_its_sizes_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-8b"] | {"head_dim": None} | change))
    with pytest.raises(StartupError, match="does not describe the shape"):
        shape_of(tmp_path, "x")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read"):
        shape_of(tmp_path, "x")
