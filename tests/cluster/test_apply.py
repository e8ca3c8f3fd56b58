"""`diptych apply`: what a cluster that serves can be given, what it refuses, and that its configuration survives being
written down."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.cluster.apply import differences, run_apply
from diptych.cluster.config import check_config, load_config
from diptych.cluster.control import connect
from diptych.cluster.control.scaled import Scaled
from diptych.cluster.control.state import ClusterState, read_config, write_config, write_state
from diptych.protos.types import EngineId

TREE = {
    "models": {"echo": {"source": "echo", "kv": {"memory_mib": 32}, "prefill": {"engines": 2}}},
    "transfer": {"transport": "grpc"},
    "faults": {"rules": [{"point": "engine.step", "action": "delay", "nth": [1], "delay_s": 0.1}]},
}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ClusterState]:
    """The files of a cluster whose process is this one."""
    with tempfile.TemporaryDirectory(prefix="apply-") as run_dir:
        yield _files(Path(run_dir), tmp_path / "cache")


def _files(run_dir: Path, cache_dir: Path) -> ClusterState:
    folder = run_dir / str(os.getpid())
    folder.mkdir()
    state = ClusterState(
        pid=os.getpid(),
        url="http://127.0.0.1:1",
        serve_url="",
        ray_address="127.0.0.1:1",
        ray_client_address=None,
        token_path=None,
        folder=str(folder),
        models=("echo",),
    )
    write_config(state, check_config({**TREE, "run_dir": str(run_dir), "cache_dir": str(cache_dir)}, "test"))
    write_state(state)
    return state


def _applied(running: ClusterState, *overrides: str, config: Path | None = None) -> int:
    return run_apply(config, [*overrides, f"run_dir={Path(running.folder).parent}"], url=running.url)


def test_a_configuration_survives_being_written_down(running: ClusterState) -> None:
    kept = read_config(running)
    assert kept.models["echo"].kv.memory_mib == 32
    assert kept.faults.rules[0].nth == (1,)
    assert differences(kept.model_dump(mode="json"), load_config(running.config_file).model_dump(mode="json")) == []


def test_defaults_are_not_written_down(running: ClusterState) -> None:
    """No cluster with a colocated layout, or with a rule that refuses, could be given another configuration: its own
    could not be read again, for it said what nobody had written.
    """
    rules = [{"name": "no", "when": {"tag": "x"}, "then": {"refuse": "not you"}}]
    tree = {
        "models": {"echo": {"source": "echo", "layout": "colocated"}},
        "gateway": {"routes": {"chat": {"targets": ["pool/echo"]}}, "rules": rules},
    }
    config = check_config(tree, "test")
    write_config(running, config)
    assert read_config(running) == config


def test_differences_are_told_by_their_paths() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": None, "gone": {}}
    assert differences(before, {"a": {"b": 2, "c": [1]}, "d": {"e": 1}}) == [("a", "b"), ("d",), ("gone",)]
    assert differences(before, before) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("router.port=9000", "router.port"),
        ("models.echo.max_context_tokens=64", "models.echo.max_context_tokens"),
        ("models.other.source=echo", "models.other"),
        ("engines.restart=false", "engines.restart"),
        ("faults.seed=3", "faults.seed"),
    ],
)
def test_what_only_a_new_cluster_can_have_is_refused_by_name(
    running: ClusterState, override: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = running.config_file.read_text()
    assert _applied(running, override) == 1
    assert running.config_file.read_text() == kept
    assert f"diptych: {told}: a cluster that serves keeps this; stop it" in capsys.readouterr().err


def test_nothing_to_change_changes_nothing(running: ClusterState, capsys: pytest.CaptureFixture[str]) -> None:
    assert _applied(running, "models.echo.kv.memory_mib=32") == 0
    assert "nothing to change" in capsys.readouterr().out


def test_the_file_that_it_was_started_with_changes_nothing(
    running: ClusterState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said that no cluster can have another models.echo.task: the one that runs knows what `auto` has found."""
    started = read_config(running)
    found = {name: settings.model_copy(update={"task": "generate"}) for name, settings in started.models.items()}
    write_config(running, started.model_copy(update={"models": found}))
    file = tmp_path / "diptych.yaml"
    file.write_text(started.model_dump_json(exclude_unset=True))
    assert _applied(running, config=file) == 0
    assert "nothing to change" in capsys.readouterr().out


def test_the_plan_with_the_changes_goes_to_the_manager_and_is_kept(
    running: ClusterState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(connect, "manager", lambda **where: "handle")
    monkeypatch.setattr(connect, "engine_pids", lambda handle, timeout_s: [])
    monkeypatch.setattr(
        connect, "apply", lambda handle, plan, timeout_s: asked.append(plan) or Scaled(ended=(EngineId("decode-0"),))
    )
    assert _applied(running, "models.echo.kv.block_tokens=8", "models.echo.decode.engines=2") == 0
    (plan,) = asked
    assert {pool.role.value: (pool.engines, pool.template.kv.block_tokens) for pool in plan.pools} == {
        "prefill": (2, 8),
        "decode": (2, 8),
    }
    assert str(plan.pools[0].template.run_dir) == running.folder
    assert "decode-0 has finished its requests and ended\n0 engines started, 1 ended" in capsys.readouterr().out
    assert read_config(running).models["echo"].kv.block_tokens == 8


def test_more_memory_than_the_machine_has_is_refused_before_anything_ends(
    running: ClusterState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connect, "manager", lambda **where: "handle")
    monkeypatch.setattr(connect, "engine_pids", lambda handle, timeout_s: [])
    monkeypatch.setattr(connect, "apply", lambda *_, **__: pytest.fail("asked the manager"))
    assert _applied(running, "models.echo.kv.memory_mib=90000000") == 1
    assert "memory" in capsys.readouterr().err


def test_without_a_change_the_command_says_what_it_wants(
    running: ClusterState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "running_cluster", lambda url, run_dir: running)
    assert run_apply(None, [], url=running.url) == 1
    assert "say what to change: --config FILE, --set KEY=VALUE" in capsys.readouterr().err
