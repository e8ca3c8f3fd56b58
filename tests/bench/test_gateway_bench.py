"""bench/gateway.py: what is made of the rounds, and that its processes answer each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def a_round(bare: float, gateway: float, litellm: float) -> dict[str, dict[str, float]]:
    made = {"bare": bare, "gateway": gateway, "litellm": litellm}
    keys = ("cpu_ms", "p50_ms", "p99_ms", "first_p50_ms", "first_p99_ms")
    return {name: dict.fromkeys(keys, value) for name, value in made.items()}


def test_what_is_added_is_of_the_same_round(gateway: ModuleType) -> None:
    """Medians of each side alone would set a quiet round of one against a loud one of the other."""
    rounds = [a_round(1.0, 2.0, 10.0), a_round(5.0, 5.5, 60.0), a_round(1.0, 1.5, 12.0)]
    found = gateway.summary(rounds)
    assert found["gateway"]["cpu_ms"] == 2.0
    assert found["gateway"]["added_p50_ms"] == 0.5
    assert found["gateway"]["times_less_cpu"] == 8.0
    assert "added_p50_ms" not in found["bare"]


def test_a_bound_that_is_missed_is_told(gateway: ModuleType) -> None:
    """A benchmark that ends with 0 whatever it finds guards nothing."""
    good = gateway.summary([a_round(1.0, 1.5, 10.0)])
    imports: dict[str, Any] = {"gateway": {"cpu_s": 0.3, "network_calls": 0, "torch": False}}
    assert gateway.missed({"whole": good, "stream": good}, imports) == []
    bad = gateway.summary([a_round(1.0, 8.0, 10.0)])
    told = gateway.missed({"whole": bad, "stream": good}, {"gateway": {**imports["gateway"], "torch": True}})
    assert [words.split(" is ")[0] for words in told] == [
        "whole: cpu_ms",
        "whole: added_p50_ms",
        "whole: added_p99_ms",
        "whole: times_less_cpu",
        "import: torch",
    ]


def test_a_result_is_never_written_over(gateway: ModuleType, tmp_path: Path) -> None:
    """The second run of a day took the first one's name, and its figures were gone."""
    first = gateway.new_file(tmp_path)
    first.write_text("{}")
    second = gateway.new_file(tmp_path)
    assert second.name == f"{first.stem}_2.json"


def test_the_page_has_the_figures_of_a_result_that_is_there(gateway: ModuleType) -> None:
    """Figures that were written by hand drift from what was measured."""
    page = gateway.PAGE.read_text()
    results = sorted((ROOT / "bench" / "results").glob("*_gateway*.json"))
    assert any(gateway.page_figures(json.loads(file.read_text())) in page for file in results)


@pytest.mark.slow
def test_it_measures(tmp_path: Path) -> None:
    """A change to the gateway's interface showed in the benchmark a release later. Bounds are not looked at here."""
    command = [sys.executable, str(ROOT / "bench" / "gateway.py"), "--rounds", "1", "--without-litellm"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    (file,) = tmp_path.iterdir()
    told = json.loads(file.read_text())
    assert set(told["results"]) == {"whole", "stream", "paced"}, done.stderr
    assert told["results"]["whole"]["gateway"]["cpu_ms"] > 0
    assert told["imports"]["gateway"]["network_calls"] == 0
    assert not told["imports"]["gateway"]["torch"]
