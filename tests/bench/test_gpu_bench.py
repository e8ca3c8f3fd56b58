"""The script that measures a whole card, with commands that measure nothing."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diptych.cluster.config import load_config
from diptych.cluster.models import resolve
from diptych.kernels.testing import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(gpu: ModuleType, tmp_path: Path) -> Any:
    out = tmp_path / "out"
    out.mkdir()
    return gpu.Bench(
        out=out, prefix="2026-01-02_none", repeats=1, commit="abc", end_at=time.monotonic() + 600, clients=1
    )


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def result(bench: Any, name: str) -> Any:
    return json.loads((bench.out / f"2026-01-02_none_{name}.json").read_text())


@pytest.fixture
def as_the_verb(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, ...]]:
    """A command that is given --json FILE, as diptych is, and is shown as diptych is."""

    def command(code: str) -> tuple[str, ...]:
        monkeypatch.setattr(gpu, "DIPTYCH", python(code))
        return (*python(code), "bench", "offline")

    return command


WRITES = 'import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text(\'{"a": 1, "commit": null}\')'


def test_a_runs_result_gets_what_it_was_and_stays_beside_a_second_one(
    bench: Any, as_the_verb: Callable[[str], tuple[str, ...]]
) -> None:
    command = as_the_verb(WRITES)
    bench.run("x", command, 60.0, about={"kind": "offline"})
    bench.run("x", command, 60.0, about={"kind": "offline"})
    found = result(bench, "x")
    assert (found["a"], found["section"], found["kind"], found["commit"]) == (1, "x", "offline", "abc")
    assert found["command"] == "diptych bench offline"
    assert "why_failed" not in found
    assert result(bench, "x_2")["a"] == 1
    assert bench.failed == []
    assert list(bench.out.glob("*.log")) == []


def test_a_run_that_fails_leaves_its_reason_and_its_last_words(bench: Any) -> None:
    bench.run("x", python("print('out of memory'); raise SystemExit(3)"), 60.0, about={})
    found = result(bench, "x")
    assert found["why_failed"] == "exit code 3"
    assert found["log"] == ["out of memory"]
    assert bench.failed == ["x: exit code 3"]


def test_a_run_that_hangs_ends_with_its_children_and_keeps_what_it_had(
    gpu: ModuleType,
    bench: Any,
    as_the_verb: Callable[[str], tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pid = tmp_path / "pid"
    child = f"import os, time, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = f"""{WRITES}
import subprocess, time
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(600)"""
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    monkeypatch.setattr(gpu, "END_S", 5.0)
    bench.run("x", as_the_verb(code), 4.0, about={})
    found = result(bench, "x")
    assert found["a"] == 1
    assert found["why_failed"].startswith("not over after 4")
    if pid.exists():  # else it was ended before it began
        with pytest.raises(ProcessLookupError):
            wait_for_end(int(pid.read_text()))


def wait_for_end(pid: int) -> None:
    """Raises ProcessLookupError once it has ended: whoever inherited it may not have buried it yet."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        os.kill(pid, 0)
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
        time.sleep(0.01)


def test_half_a_result_is_none(bench: Any, as_the_verb: Callable[[str], tuple[str, ...]]) -> None:
    bench.run("x", as_the_verb(WRITES.replace("null}", "nu")), 60.0, about={})
    assert "a" not in result(bench, "x")


def test_a_run_without_time_is_not_begun_and_told(bench: Any) -> None:
    bench.end_at = time.monotonic() + 1
    bench.run("x", python("raise SystemExit(1)"), 60.0, about={})
    assert bench.failed == ["x: not begun: no time left"]
    assert list(bench.out.iterdir()) == []


def test_the_server_is_given_settings_that_there_are(gpu: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").touch()
    flag, model, *options = gpu.serve_options(folder, 8123)
    assert (flag, set(options[::2])) == ("--model", {"--set"})
    config = load_config(None, options[1::2], model)
    assert list(config.models) == ["llama-8b"]
    settings = config.models["llama-8b"]
    assert (settings.source, settings.weights, settings.layout) == (str(folder), "random", "colocated")
    assert (settings.kv.prefix_cache, config.router.limits.max_running, config.router.port) == (False, 1024, 8123)


def test_every_id_of_the_vocabulary_has_a_word_of_its_own(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    monkeypatch.setitem(gpu.SHAPES, "small", gpu.SHAPES["llama-8b"] | {"vocab_size": 300})
    gpu.write_model(tmp_path, "small")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("t17 t299 nothing").ids == [17, 299, 0]
    assert tokenizer.decode([17, 299], skip_special_tokens=False) == "t17 t299"
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 300


def test_the_model_over_http_is_one_that_serve_takes(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"vocab_size": 300, "bos_token_id": 2, "eos_token_id": 1}
    monkeypatch.setitem(gpu.SHAPES, "small", gpu.SHAPES["llama-8b"] | small)
    gpu.write_model(tmp_path, "small")
    facts = resolve(str(tmp_path), tmp_path / "cache", has_weights=False).facts
    assert (facts.vocab_size, facts.layers) == (300, 32)
    assert facts.chat_template


def test_rows_over_http_are_those_of_the_peer(gpu: ModuleType) -> None:
    peer = json.loads((ROOT / "bench" / "peers" / "h200_http.json").read_text())
    assert [row for row, *_ in gpu.HTTP_ROWS] == [row for row, figures in peer.items() if isinstance(figures, dict)]


@pytest.mark.slow
def test_the_verb_itself_runs_as_a_section(gpu: ModuleType, bench: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = make_tiny_checkpoint(tmp_path / "whole") / "config.json"
    (folder / "config.json").write_bytes(config.read_bytes())
    gpu.offline(bench, "tiny", str(folder), "--set", "models.tiny.device=cpu", box_s=200.0, workloads=("2x4x2",))
    found = result(bench, "tiny")
    assert bench.failed == []
    assert found["2x4x2"]["tokens_out"] == 4
    assert found["command"].startswith("diptych bench offline --model ")


def test_every_op_that_is_measured_has_its_turn(gpu: ModuleType) -> None:
    from diptych.kernels.ops.cases import benches

    assert sorted(gpu.KERNELS) == sorted(benches())


def test_a_row_that_is_not_there_is_refused_with_those_that_are(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "http", "--row", "9000"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--row 9000: no row of http" in (told := capsys.readouterr().err)
    assert "8000/500 at 2.5 requests/s" in told


def test_no_folder_of_the_machine_is_shown(gpu: ModuleType) -> None:
    assert gpu.shown([*gpu.DIPTYCH, "bench", "--profile", "/root/out/a.json"]) == [
        "diptych",
        "bench",
        "--profile",
        "a.json",
    ]
    assert gpu.shown([sys.executable, "-m", "pytest"]) == ["python", "-m", "pytest"]
