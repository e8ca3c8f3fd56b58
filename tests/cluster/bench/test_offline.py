"""The verb for real, on tiny models. What it measured is never judged, only what it counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer.testing
from tokenizers import Tokenizer, models, pre_tokenizers

from diptych.cluster.cli import app
from diptych.kernels.testing import make_tiny_checkpoint

FIGURES = {"s", "spread_s", "output_tok_s", "total_tok_s", "ttft_p50_s"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(512)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bench(*arguments: object) -> typer.testing.Result:
    common = ["bench", "offline"]
    if "llama-8b" not in arguments:
        common += ["--set", "models.tiny.kv.memory_mib=8", "--set", "models.tiny.dtype=float32"]
    return typer.testing.CliRunner().invoke(app, [*common, *map(str, arguments)])


def result_of(*arguments: object) -> dict[str, object]:
    done = bench(*arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def check_figures(figures: object, tokens_in: int, tokens_out: int) -> None:
    assert isinstance(figures, dict)
    assert set(figures) == FIGURES
    low, high = figures["spread_s"]
    assert 0 < low <= figures["s"] <= high
    assert 0 < figures["ttft_p50_s"] <= high
    assert figures["output_tok_s"] * figures["s"] == pytest.approx(tokens_out, rel=0.05)
    assert figures["total_tok_s"] * figures["s"] == pytest.approx(tokens_in + tokens_out, rel=0.05)


def test_every_workload_is_run_whole_and_told_on_the_last_line(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "work.jsonl"
    prompts.write_text('{"prompt": "t3 t4 t5"}\n{"prompt": [7, 8]}\n')
    out = tmp_path / "out.json"
    result = result_of(
        *("--model", tiny, "--workload", "5x17x3", "--workload", "2x1x1", "--repeats", 2, "--json", out),
        *("--prompts", prompts, "--output", 4),
    )
    assert set(result) == {"system", "model", "startup_s", "5x17x3", "2x1x1", "work.jsonl", "peak_memory_mib"}
    assert str(result["system"]).startswith("diptych ")
    assert result["model"] == "tiny"
    assert result["peak_memory_mib"]
    check_figures(result["5x17x3"], 85, 15)
    check_figures(result["2x1x1"], 2, 2)
    check_figures(result["work.jsonl"], 5, 8)
    assert json.loads(out.read_text()) == result


@pytest.mark.parametrize("layout", ["colocated", "disaggregated"])
def test_a_shape_without_weights_or_tokenizer_is_enough_in_both_layouts(
    tiny: Path, tmp_path: Path, layout: str
) -> None:
    shape = tmp_path / "tiny"
    shape.mkdir()
    (shape / "config.json").write_text((tiny / "config.json").read_text())
    result = result_of("--model", shape, "--random-weights", "--layout", layout, "--workload", "80x33x9")
    check_figures(result["80x33x9"], 80 * 33, 80 * 9)


def test_the_configuration_asks_for_random_weights_as_the_option_does(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text((tiny / "config.json").read_text())
    done = bench("--model", tmp_path / "tiny", "--set", "models.tiny.weights=random", "--workload", "2x3x2")
    assert done.exit_code == 0, done.output
    assert "tiny, random weights, float32" in done.stdout
    assert "degraded: weights are random" in done.stdout


@pytest.mark.parametrize("layout", ["colocated", "disaggregated"])
def test_the_echo_model_measures_all_but_the_model(tiny: Path, layout: str) -> None:
    echo = ["--set", "models.tiny.source=echo", "--set", "models.tiny.echo={layers: 3, kv_heads: 1, head_dim: 64}"]
    done = bench("--model", tiny, *echo, "--layout", layout, "--workload", "3x20x5")
    assert done.exit_code == 0, done.output
    assert "degraded: model echo" in done.stdout


def test_requests_share_prefixes_with_each_other_and_never_with_an_earlier_repeat(tiny: Path, tmp_path: Path) -> None:
    """A second repeat over a warm cache would be faster for a reason that the reader cannot see."""
    prompts = tmp_path / "shared.jsonl"
    one = json.dumps({"prompt": list(range(3, 3 + 48))})
    prompts.write_text(one + "\n")
    alone = bench("--model", tiny, "--prompts", prompts, "--output", 2, "--repeats", 3)
    assert "48 tokens in (0 cached)" in alone.stdout, alone.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "llama-8b", "--workload", "1x1x1"], "add --random-weights"),
        (["--workload", "1x1"], "REQUESTSxINPUTxOUTPUT"),
        ([], "nothing to measure"),
        (["--workload", "1x1x1", "--workload", "1x1x1"], "given twice"),
        (["--workload", "1x1x1", "--layout", "both"], "colocated and disaggregated"),
        (["--workload", "1x1x1", "--output", "3"], "belong together"),
        (["--workload", "1x1x1", "--random-weights", "--set", "models.tiny.source=echo"], "has no weights"),
        (["--workload", "1x1x1", "--set", "models.tiny.decode.engines=2"], "decode.engines"),
        (["--workload", "1x1x1", "--set", "models.tiny.decode.engine=2"], "did you mean engines"),
        (["--workload", "1x1x1", "--set", "models.other.source=x"], "several models"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_before_anything_starts(
    tiny: Path, arguments: list[str], sentence: str
) -> None:
    model = [] if "--model" in arguments else ["--model", str(tiny)]
    done = bench(*model, *arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert sentence in done.stderr
    assert done.stderr.startswith("diptych: ")
    assert done.stderr.count("\n") == 1


def test_a_prompt_that_no_context_holds_is_refused_with_the_numbers(tiny: Path) -> None:
    done = bench("--model", tiny, "--workload", "1x2000x1")
    assert done.exit_code == 1
    assert "needs a context of 2001 tokens and there are 1024" in done.stderr


def test_ids_outside_of_the_vocabulary_are_refused(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text('{"prompt": [511, 512]}\n')
    done = bench("--model", tiny, "--prompts", prompts, "--output", 1)
    assert done.exit_code == 1
    assert "512" in done.stderr
