"""What figures are said to be measured on, with a git and an nvidia-smi that the test provides."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from diptych.cluster.bench import provenance
from diptych.cluster.bench.provenance import CardWatch, commit_of


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_the_commit_is_told_with_whether_the_sources_are_those_of_it(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    assert commit_of(tmp_path) == (None, None), "no commit yet"
    inner = tmp_path / "a"
    inner.mkdir()
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "x")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "other").write_text("not the project's")
    assert commit_of(inner) == (head, False)
    (tmp_path / "file").write_text("2")
    assert commit_of(inner) == (head, True)


def test_packages_that_are_not_there_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no-such-package-here"))
    found = provenance.versions()
    assert found["torch"]
    assert found["no-such-package-here"] is None


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose readings go on until somebody ends them."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '  *loop*) while echo "1500, 640.5, 61, 140000"; do sleep 0.02; done ;;\n'
        '  *) echo "NVIDIA H200, 575.1, 143771, 1980, 3201, [N/A]" ;;\n'
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_a_card_tells_its_name_and_limits(smi: None) -> None:
    assert provenance.card() == {
        "name": "NVIDIA H200",
        "driver": "575.1",
        "memory_mib": 143771,
        "max_sm_mhz": 1980,
        "memory_mhz": 3201,
        "power_limit_w": None,
    }


def test_a_card_is_watched_while_something_runs_on_it(smi: None) -> None:
    with CardWatch() as watch:
        began = time.monotonic()
        while (state := watch.between(began, time.monotonic())) is None:
            assert time.monotonic() < began + 30
    assert state == {"sm_mhz": 1500, "power_w": 640.5, "celsius": 61, "used_mib": 140000, "power_w_max": 640.5}
    assert watch.between(began - 20, began - 10) is None


def test_a_machine_without_a_card_or_with_a_broken_driver_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with CardWatch() as watch:
        assert provenance.card() is None
    assert watch.between(0, time.monotonic()) is None
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    broken.chmod(0o755)
    assert provenance.card() is None
    with CardWatch() as watch:
        pass
    assert watch.between(0, time.monotonic()) is None
