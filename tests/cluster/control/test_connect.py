"""Where a running cluster is looked for, without one: a state file first, then as Ray's own commands do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.cluster.control import connect
from diptych.cluster.control.state import ClusterState, make_folder, write_state
from diptych.cluster.scale import run_scale
from diptych.cluster.status import cluster_url
from diptych.protos.errors import StartupError
from diptych.protos.types import Role


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one, as the configuration wants it; nothing is there yet."""
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as name:
        yield Path(name) / "r"


@pytest.fixture
def state(run_dir: Path) -> ClusterState:
    made = ClusterState(
        pid=os.getpid(),
        url="http://u",
        serve_url="s",
        ray_address="r:1",
        ray_client_address=None,
        token_path=None,
        folder=str(make_folder(run_dir)),
        models=("m",),
    )
    write_state(made)
    return made


def test_a_cluster_of_diptych_serve_comes_before_any_other_ray(
    run_dir: Path, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert connect.located(None, run_dir) == state
    assert connect.located("http://u", run_dir) == state
    with pytest.raises(StartupError, match="at http://other"):
        connect.located("http://other", run_dir)


def test_without_one_the_ray_cluster_is_that_of_rays_own_commands(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: "10.0.0.1:6379")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert connect.located(None, run_dir) == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert connect.located(None, run_dir) == "10.0.0.2:6379"
    asked: list[str] = []
    monkeypatch.setattr(connect, "deployed_url", lambda address: asked.append(address) or "http://deployed")
    assert cluster_url(None, [f"run_dir={run_dir}"], None) == "http://deployed"
    assert cluster_url(None, [f"run_dir={run_dir}"], "http://given") == "http://given"
    assert asked == ["10.0.0.2:6379"]


def test_a_ray_that_nobody_answers_for_is_a_sentence_with_its_address(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unused_tcp_port: int
) -> None:
    """The file that names the latest `ray start` outlives a Ray that was killed."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(StartupError, match=f"nothing answers at 127.0.0.1:{unused_tcp_port}"):
        cluster_url(None, [f"run_dir={run_dir}"], None)
    assert run_scale("m", {Role.DECODE: 2}, overrides=[f"run_dir={run_dir}"]) == 1
    assert f"nothing answers at 127.0.0.1:{unused_tcp_port}" in capsys.readouterr().err


def test_with_neither_the_sentence_names_all_ways(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "ray_address", lambda: None)
    with pytest.raises(StartupError, match=r"looked in .*/r\); start `diptych serve`, .*--config, .*RAY_ADDRESS"):
        cluster_url(None, [f"run_dir={run_dir}"], None)
