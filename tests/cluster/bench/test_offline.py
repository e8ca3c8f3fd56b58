"""The verb for real, on tiny models. What it measured is never judged, only what it counted."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from tokenizers import Tokenizer, models, pre_tokenizers

from diptych.cluster.bench import offline
from diptych.cluster.bench.batches import Run
from diptych.cluster.bench.workload import parse_workload
from diptych.cluster.cli import app
from diptych.cluster.engine import step_times
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.protos.errors import EngineFault

FIGURES = {
    *("s", "spread_s", "output_tok_s", "total_tok_s", "ttft_p50_s", "requests", "tokens_in", "tokens_out"),
    *("cached_tokens", "repeats_s", "seeds", "steps", "card_state"),
}
ABOUT = {
    *("system", "model", "startup_s", "peak_memory_mib", "date", "commit", "dirty", "versions", "machine", "card"),
    *("weights", "layout", "shape", "config", "degraded", "device", "dtype", "engine", "memory_mib", "kv_tokens"),
    *("through", "timeline_s", "settled_s", "path"),
}


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


def check_figures(figures: object, tokens_in: int, tokens_out: int, *, on_card: bool = False) -> None:
    assert isinstance(figures, dict)
    assert set(figures) - {"of_engine"} == FIGURES
    low, high = figures["spread_s"]
    assert 0 < low <= figures["s"] <= high
    assert 0 < figures["ttft_p50_s"] <= high
    assert figures["output_tok_s"] * figures["s"] == pytest.approx(tokens_out, rel=0.05)
    assert figures["total_tok_s"] * figures["s"] == pytest.approx(tokens_in + tokens_out, rel=0.05)
    assert (figures["tokens_in"], figures["tokens_out"]) == (tokens_in, tokens_out)
    for mean in figures["steps"].values():
        both = mean["host_us"], mean["device_us"]
        busy = max(both) if on_card else sum(both)  # where steps follow each other at once, each hides the other
        assert 0 < busy <= mean["step_us"] * 1.01


def test_every_workload_is_run_whole_and_told_on_the_last_line(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "work.jsonl"
    prompts.write_text('{"prompt": "t3 t4 t5"}\n{"prompt": [7, 8]}\n')
    out = tmp_path / "out.json"
    result = result_of(
        *("--model", tiny, "--workload", "5x17x3", "--workload", "2x1x1", "--repeats", 2, "--json", out),
        *("--prompts", prompts, "--output", 4),
    )
    assert set(result) == ABOUT | {"5x17x3", "2x1x1", "work.jsonl"}
    assert str(result["system"]).startswith("diptych ")
    assert result["model"] == "tiny"
    assert result["peak_memory_mib"]
    check_figures(result["5x17x3"], 85, 15)
    check_figures(result["2x1x1"], 2, 2)
    check_figures(result["work.jsonl"], 5, 8)
    assert json.loads(out.read_text()) == result
    assert result["5x17x3"]["seeds"] == [100, 101]  # type: ignore[index]
    assert result["5x17x3"]["cached_tokens"] == 0  # type: ignore[index]
    assert result["work.jsonl"]["seeds"] is None  # type: ignore[index]


def test_the_result_tells_what_it_was_measured_on_and_with(tiny: Path) -> None:
    result: dict[str, Any] = result_of(
        "--model", tiny, "--workload", "3x40x4", "--set", "models.tiny.decode.max_running=2"
    )
    assert (result["device"], result["dtype"], result["weights"], result["through"]) == (
        *("cpu", "float32", "checkpoint"),
        ["engine"],
    )
    engine = result["engine"]
    assert (engine["max_running"], engine["block_tokens"], engine["max_context_tokens"]) == (2, 16, 1024)
    assert result["kv_tokens"] == 16 * engine["num_blocks"] > 0
    assert result["memory_mib"]["kv"] == 8
    assert result["shape"]["architectures"] == ["LlamaForCausalLM"]
    assert result["config"]["decode"]["max_running"] == 2
    assert result["versions"]["torch"]
    assert result["timeline_s"]["weights"] >= 0
    assert sum(result["timeline_s"].values()) == pytest.approx(result["startup_s"], abs=0.1)
    # Two seats for three requests: steps with a prompt, and 2 x 3 tokens from steps of one token a row.
    steps = result["3x40x4"]["steps"]
    assert steps["prompts"]["tokens"] * steps["prompts"]["steps"] >= 3 * 40
    assert steps["decode"]["rows"] <= 2


def test_the_times_of_the_steps_add_up_to_the_repeats_and_leave_out_what_is_between_them(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run.prompts

    class Clock:
        ahead_s = 0.0

        def perf_counter(self) -> float:
            return time.perf_counter() + self.ahead_s

    clock = Clock()

    def slowly(run: Run, repeat: int) -> Sequence[Sequence[int]]:
        clock.ahead_s += 1000.0  # to make a million random ids
        return whole(run, repeat)

    monkeypatch.setattr(step_times, "time", clock)
    monkeypatch.setattr(Run, "prompts", slowly)
    figures: Any = result_of("--model", tiny, "--workload", "3x20x3", "--repeats", 3)["3x20x3"]
    in_steps = sum(mean["steps"] * mean["step_us"] for mean in figures["steps"].values()) / 1e6
    assert in_steps <= sum(figures["repeats_s"]) * 1.05


def test_prompts_are_those_that_the_peers_got(tiny: Path) -> None:
    """bench/peers/: random.Random(seed), ids from 1,000 to 99,999."""
    rng = random.Random(101)
    theirs = [[rng.randrange(1000, 100_000) for _ in range(7)] for _ in range(3)]
    assert Run(parse_workload("3x7x1"), None, 128_256).prompts(1) == theirs


def test_through_a_session_every_token_arrives_and_the_ratio_is_told(tiny: Path) -> None:
    done = bench(
        "--model", tiny, "--workload", "9x20x6", "--workload", "2x3x1", "--through", "engine", "--through", "session"
    )
    assert done.exit_code == 0, done.output + repr(done.exception)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == ABOUT | {"9x20x6", "9x20x6 through session", "2x3x1", "2x3x1 through session"}
    for key in ("9x20x6", "9x20x6 through session"):
        check_figures(result[key], 180, 54)
        assert result[key]["cached_tokens"] == 0
    told = result["9x20x6 through session"]
    assert told["of_engine"] == pytest.approx(result["9x20x6"]["s"] / told["s"], rel=0.01)
    assert "through a session: " in done.stdout
    assert "of the engine alone" in done.stdout


def test_a_session_alone_has_the_names_that_the_engine_alone_has(tiny: Path) -> None:
    result = result_of("--model", tiny, "--workload", "4x5x3", "--through", "session")
    check_figures(result["4x5x3"], 20, 12)
    assert result["through"] == ["session"]


def test_a_request_that_the_engine_refuses_is_a_sentence_through_a_session_too(tiny: Path) -> None:
    done = bench("--model", tiny, "--workload", "1x1100x1", "--through", "session")
    assert done.exit_code == 1
    assert "needs a context of 1101 tokens" in done.stderr


def test_a_profile_has_the_ops_of_a_steps_in_the_middle(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    done = bench("--model", tiny, "--workload", "4x16x30", "--workload", "1x9x1", "--profile", out)
    assert done.exit_code == 0, done.output + repr(done.exception)
    found = json.loads(out.read_text())
    assert set(found) == {"4x16x30", "1x9x1"}
    middle = found["4x16x30"]
    assert middle["first_step"] in range(8, 12)
    assert middle["steps"] == 20
    assert 0 <= middle["idle_share"] < 1
    assert sum(kernel["share"] for kernel in middle["kernels"]) <= 1.01
    assert all(kernel["us"] >= 0 and kernel["count"] > 0 for kernel in middle["kernels"])
    assert found["1x9x1"]["steps"] == 1, "a batch of one step is traced whole"
    assert "profile of 4x16x30: 20 steps" in done.stdout
    assert "profiles" not in json.loads(done.stdout.splitlines()[-1])


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


def test_a_run_that_fails_late_has_left_the_figures_that_it_had(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> dict[str, object]:
        raise EngineFault("the tracer does not work here")

    monkeypatch.setattr(offline, "trace", fails)
    out = tmp_path / "out.json"
    done = bench("--model", tiny, "--workload", "2x5x3", "--profile", tmp_path / "p.json", "--json", out)
    assert (done.exit_code, done.stderr) == (1, "diptych: the tracer does not work here\n")
    kept = json.loads(out.read_text())
    assert set(kept) == ABOUT | {"2x5x3"}
    check_figures(kept["2x5x3"], 10, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["native", "generic"])
def test_on_a_card_both_ways_of_computing_can_be_measured(tiny: Path, path: str) -> None:
    result = result_of("--model", tiny, "--set", "models.tiny.device=cuda", "--workload", "4x20x5", "--path", path)
    assert result["path"] == path
    degraded = " ".join(map(str, result["degraded"]))  # type: ignore[call-overload]
    assert "hand-written" not in degraded, "it was asked for"
    check_figures(result["4x20x5"], 80, 20, on_card=True)


@pytest.mark.gpu
def test_on_a_card_events_time_the_device_and_kernels_are_traced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    done = bench(
        *("--model", tiny, "--set", "models.tiny.device=cuda", "--workload", "8x40x40", "--profile", out),
        *("--through", "engine", "--through", "session"),
    )
    assert done.exit_code == 0, done.output + repr(done.exception)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["device"] == torch.cuda.get_device_name()
    assert result["memory_mib"]["card_used"] > result["memory_mib"]["kv"]
    assert result["engine"]["depth"] == 2
    for key in ("8x40x40", "8x40x40 through session"):
        decode = result[key]["steps"]["decode"]
        assert decode["steps"] >= 38
        assert 0 < decode["device_us"] <= decode["step_us"] * 1.2
        assert 0 < decode["host_us"] <= decode["step_us"] * 1.01
    found = json.loads(out.read_text())["8x40x40"]
    assert 0 <= found["idle_share"] < 1
    assert found["steps"] == 20
    assert all(kernel["count"] > 0 for kernel in found["kernels"])
    assert len(found["kernels"]) > 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "llama-8b", "--workload", "1x1x1"], "add --random-weights"),
        (["--workload", "1x1"], "REQUESTSxINPUTxOUTPUT"),
        ([], "nothing to measure"),
        (["--workload", "1x1x1", "--workload", "1x1x1"], "given twice"),
        (["--workload", "1x1x1", "--layout", "both"], "colocated and disaggregated"),
        (["--workload", "1x1x1", "--output", "3"], "belong together"),
        (["--workload", "1x1x1", "--through", "http"], "engine and session"),
        (["--workload", "1x1x1", "--path", "fast"], "native and generic"),
        (["--workload", "1x1x1", "--path", "generic", "--set", "models.tiny.device=cpu"], "have none"),
        (["--workload", "1x1x1", "--through", "session", "--layout", "disaggregated"], "--layout colocated"),
        (["--workload", "1x1x1", "--through", "session", "--profile", "/tmp/none.json"], "add --through engine"),
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
