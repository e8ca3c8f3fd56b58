"""The verb without a card; what it prints of one, from figures made up. Timing itself is shown on a card alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing

from diptych.cluster.cli import app
from diptych.cluster.engine import op_times
from diptych.kernels.ops.cases import Case, benches
from diptych.kernels.ops.measure import Ceilings


def run(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, ["bench", "kernels", *arguments])


def test_without_a_card_it_is_a_sentence_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run()
    assert done.exit_code == 1
    assert "torch finds none here" in done.stderr


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A card that is not there; returns the names of the cases that were measured on it."""
    measured: list[str] = []

    def measure(case: Case, limits: Ceilings) -> dict[str, Any]:
        measured.append(case.name)
        assert limits.copy_gb_s == 4000.0
        figures = {"us": 10.0, "of_ceiling": 0.5}
        rate = {"tflop_s": 300.0} if case.flop else {"gb_s": 2000.0}
        return figures | rate | {"peers": {name: {"error": "not installed"} for name in case.peers}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(op_times, "ceilings", lambda device: Ceilings(4000.0, 700.0))
    monkeypatch.setattr(op_times, "too_little_memory", lambda case: None)
    monkeypatch.setattr(op_times, "measure", measure)
    monkeypatch.setattr(op_times, "card", lambda: {"device": "none"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return measured


def test_every_case_is_told_and_stands_in_the_json(card: list[str], tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    done = run("--op", "silu_mul", "--op", "add_norm", "--json", str(out))
    assert done.exit_code == 0, done.output + repr(done.exception)
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == result
    assert result["ceilings"] == {"copy_gb_s": 4000.0, "product_tflop_s": 700.0}
    assert result["device"] == "none"
    cases = [key for key in result if key.startswith(("silu_mul ", "add_norm "))]
    assert len(cases) == len(set(cases)) == len(card) > 5
    assert all(key in done.stdout for key in cases)
    assert "50.0%" in done.stdout
    assert "torch: not installed" in done.stdout


def test_an_op_that_is_not_measured_is_named_beside_those_that_are(card: list[str]) -> None:
    done = run("--op", "nonsense")
    assert done.exit_code == 1
    assert "'nonsense'" in done.stderr
    assert "silu_mul" in done.stderr
    assert not card


def test_a_case_that_is_too_large_for_the_card_is_told_and_the_rest_goes_on(
    card: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        op_times, "too_little_memory", lambda case: {"error": "needs 3 GiB"} if "8192" in case.name else None
    )
    done = run("--op", "silu_mul")
    assert done.exit_code == 0, done.output
    assert "needs 3 GiB" in done.stdout
    assert not any("8192" in name for name in card)


def test_a_case_that_fails_is_told_and_what_was_measured_before_stays(
    card: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "kernels.json"
    whole: Callable[[Case, Ceilings], dict[str, Any]] = vars(op_times)["measure"]  # the fixture's

    def measure(case: Case, limits: Ceilings) -> dict[str, Any]:
        if "512" in case.name:
            raise RuntimeError("out of registers\nand more")
        if case.name.startswith("1x"):
            kept.append(json.loads(out.read_text()) if out.exists() and out.read_text() else {})
        return whole(case, limits)

    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(op_times, "measure", measure)
    done = run("--op", "add_norm", "--op", "silu_mul", "--json", str(out))
    assert done.exit_code == 0, done.output + repr(done.exception)
    failed = {
        key: told for key, told in json.loads(out.read_text()).items() if isinstance(told, dict) and "error" in told
    }
    assert failed
    assert all("512" in key and told["error"] == "out of registers" for key, told in failed.items())
    assert not any(key.startswith("add_norm") for key in kept[0])
    assert any(key.startswith("add_norm") for key in kept[-1]), "kept while silu_mul had not been measured yet"


def test_tuning_takes_the_trials_of_the_chosen_ops_alone(card: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[str] = []

    def tune(trials: Sequence[Any], tell: Callable[[str], None]) -> None:
        tuned.extend(trial.op for trial in trials)

    monkeypatch.setattr("diptych.kernels.ops.tuning.tune", tune)
    assert run("--op", "silu_mul", "--tune").exit_code == 0
    assert tuned == []
    done = run("--op", "linear", "--tune")
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert set(tuned) == {"linear", "linear_whole"}


@pytest.mark.parametrize("op", sorted(benches()))
def test_every_case_has_a_name_of_its_own_and_counts_something(op: str) -> None:
    names = []
    device = torch.device("cpu" if op == "sampling" else "meta")  # whose cases share a state, which is small
    for case in benches()[op].cases(device):
        names.append(case.name)
        assert case.size_bytes > 0, case.name
        assert case.flop >= 0, case.name
    assert names
    assert len(names) == len(set(names))


@pytest.mark.gpu
def test_on_a_card_rates_are_below_the_ceilings_and_peers_are_told(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    done = run("--op", "silu_mul", "--op", "add_norm", "--json", str(out))
    assert done.exit_code == 0, done.output + repr(done.exception)
    result = json.loads(out.read_text())
    assert result["device"] == torch.cuda.get_device_name()
    assert result["ceilings"]["copy_gb_s"] > 100
    cases = {key: told for key, told in result.items() if key.startswith(("silu_mul ", "add_norm "))}
    assert len(cases) > 8
    for key, told in cases.items():
        assert "error" not in told, key
        assert 0 < told["of_ceiling"] < 1.15, key  # reading alone is faster than a copy
        assert told["peers"]["torch"]["us"] > 0, key
        assert told["of_best_peer"] > 0, key
