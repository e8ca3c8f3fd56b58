"""bench/llm_overhead.py: what is made of the rounds, and that a bound that is missed is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llm_overhead", ROOT / "bench" / "llm_overhead.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_round(bare: float, ours: float, instructor: float) -> dict[str, dict[str, dict[str, float]]]:
    figures = {"bare": bare, "ours": ours, "instructor": instructor}
    return {"plain_sync": {name: {"cpu_ms": value, "wall_ms": value} for name, value in figures.items()}}


def test_what_is_added_is_of_the_same_round(overhead: ModuleType) -> None:
    """Medians of each side alone would set a quiet round of one against a loud one of the other."""
    found = overhead.summary([a_round(1.0, 1.5, 3.0), a_round(5.0, 5.4, 6.0), a_round(1.0, 1.2, 2.0)])["plain_sync"]
    assert found["ours"]["added_ms"] == 0.4
    assert found["instructor"]["times_ours"] == 1.667
    assert found["instructor"]["share"] == 0.25
    assert "share" not in found["ours"]


def test_a_bound_that_is_missed_is_told(overhead: ModuleType) -> None:
    """A benchmark that ends with 0 whatever it finds guards nothing."""
    imported: dict[str, Any] = {"cpu_s": 0.3, "rss_mib": 41.0, "heavy": []}
    assert overhead.missed(overhead.summary([a_round(1.0, 1.5, 3.0)]), imported) == []
    slow = overhead.summary([a_round(1.0, 2.5, 3.0)])
    heavy = {"cpu_s": 0.5, "rss_mib": 90.0, "heavy": ["torch"]}
    words = overhead.missed(slow, heavy)
    assert [one.split(",")[0].split(" the bound")[0] for one in words] == [
        "plain_sync: a call adds 1.5 ms to the bare client's",
        "plain_sync: a call adds 0.75 of what instructor's adds",
        "the import takes 0.5 s",
        "the import takes 90.0 MiB",
        "the import loads torch",
    ]
