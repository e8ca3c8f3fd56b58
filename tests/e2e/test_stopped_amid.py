"""Engines that are stopped where nobody watches, as they start and while there is no manager: they end all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from serving import Cluster, alive, descendants, start_cluster, stop_cluster

DIPTYCH = Path(sys.executable).with_name("diptych")
PATIENCE_S = 120

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("stopped")
    config = {"models": {"echo": {"source": "echo", "kv": {"memory_mib": 32}, "decode": {"engines": 2}}}}
    file = folder / "diptych.yaml"
    file.write_text(yaml.safe_dump(config))
    running = start_cluster(folder, "--config", str(file))
    yield running
    running.tree |= descendants(running.process.pid)
    code = stop_cluster(running)
    assert code == 0, running.printed()
    assert not alive(running.tree)


def engines(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {e["engine"]: e for e in cluster.get("/info")["engines"] if e["connected"] and not e["draining"]}


def until(condition: Callable[[], Any], message: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, message
        time.sleep(0.1)
    return found


def actors(cluster: Cluster, name: str) -> set[int]:
    found = set()
    for pid in descendants(cluster.process.pid):
        try:
            title = "".join(psutil.Process(pid).cmdline()[:1])
        except psutil.Error:
            continue
        if title.startswith(f"ray::{name}"):
            found.add(pid)
    return found


def test_one_that_is_stopped_while_there_is_no_manager_is_killed_and_replaced(own: Cluster) -> None:
    before = engines(own)
    stopped = before["decode-0"]["pid"]
    [manager] = actors(own, "PoolManager")
    os.kill(stopped, signal.SIGSTOP)
    os.kill(manager, signal.SIGKILL)
    until(lambda: not alive({stopped}), "the stopped one lives")
    until(lambda: engines(own).keys() == before.keys(), "it is not replaced")


def test_one_that_is_stopped_as_it_starts_is_killed_and_its_failure_told(own: Cluster) -> None:
    before = actors(own, "EngineActor")
    growing = subprocess.Popen(
        [str(DIPTYCH), "scale", "echo", "--decode", "3", "--url", own.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    [fresh] = until(lambda: actors(own, "EngineActor") - before, "none starts")
    until(lambda: "start" in "".join(psutil.Process(fresh).cmdline()[:1]), "it does not load")
    os.kill(fresh, signal.SIGSTOP)
    told = growing.communicate(timeout=PATIENCE_S)[0].decode()
    assert "its process was stopped" in told
    until(lambda: not alive({fresh}), "the stopped one lives")
    assert len(engines(own)) == 3
