"""A stranger drives the rig by its command line alone: it starts, describes, hits, reads and stops a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from procfs import descendants, lives
from rig import Rig, RigError, attach, start

RIG = Path(__file__).with_name("rig.py")


def rig(folder: Path, *arguments: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, str(RIG), "--folder", str(folder), *arguments], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


def test_what_is_not_there_is_said_in_a_sentence(tmp_path: Path) -> None:
    assert "no rig in" in rig(tmp_path, "describe", code=1)
    with pytest.raises(RigError, match="the models are echo, smollm2"):
        start("gpt", folder=tmp_path)


def test_tenants_are_told_by_header_while_there_are_no_keys(tmp_path: Path) -> None:
    here = Rig("http://127.0.0.1:1", "echo", "echo", tmp_path, os.getpid())
    assert here.headers("a") == {"x-tenant": "a"}
    assert here.headers("admin") == {}
    with pytest.raises(RigError):
        here.headers("c")
    with pytest.raises(RigError, match="does not answer"):
        here.processes()
    here.keys = {"a": "k"}
    assert here.headers("a") == {"authorization": "Bearer k"}


def test_a_rig_is_found_again_by_its_folder(tmp_path: Path) -> None:
    here = Rig("http://127.0.0.1:1", "echo", "echo", tmp_path, 5, recorded={"3:1,2": ["a"]})
    here.save()
    assert attach(tmp_path) == here


def test_answers_of_echo_are_known_without_a_cluster(tmp_path: Path) -> None:
    here = Rig("http://127.0.0.1:1", "echo", "echo", tmp_path, 5)
    whole = here.expected([17, 4, 99], 8)
    assert len(whole) == 8
    assert here.expected([17, 4, 99], 5) == whole[:5]
    assert here.expected([17, 4, 99], 8, temperature=2.0, seed=7) != whole


def test_the_rig_needs_nothing_but_the_standard_library() -> None:
    code = f"import sys; sys.path.insert(0, {str(RIG.parent)!r}); import rig; print(rig.Rig.__name__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "Rig\n", done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a cluster that runs; stopped if the tests did not do it."""
    folder = tmp_path_factory.mktemp("rig")
    described = rig(folder, "start")
    yield folder
    if lives(described["pid"]):
        rig(folder, "stop")


@pytest.mark.ray
@pytest.mark.slow
def test_an_exam_can_do_all_it_needs_and_nothing_is_left_behind(folder: Path) -> None:
    told = rig(folder, "describe")
    names = {process["name"] for process in told["processes"]}
    assert {"prefill-0", "prefill-1", "decode-0", "decode-1", "router-0", "manager"} <= names
    assert "# HELP" in attach(folder).text("/metrics")
    page = attach(folder).text("/metrics")
    assert all(name in page for name in told["gauges"].values())

    expected = rig(folder, "expected", "--prompt", "17,4,99", "--tokens", "6")
    body = {"model": told["model"], "prompt": [17, 4, 99], "max_tokens": 6, "temperature": 0}
    answer = attach(folder).post("/v1/completions", body, "b")["choices"][0]["text"]
    assert [int(word[1:]) for word in answer.split()] == expected

    rule = {"point": "engine.step", "action": "delay", "probability": 1, "delay_s": 0.01}
    assert rig(folder, "faults", json.dumps([rule])) == [rule]
    assert rig(folder, "faults", "[]") == []
    paused = rig(folder, "pause", "prefill-1", "0.3")
    assert paused["signal"] == "SIGSTOP"
    assert rig(folder, "quiet", "--within", "10")["held"] == {}

    family = descendants(told["pid"])
    assert rig(folder, "stop") == {"left_behind": []}
    assert not [pid for pid in family if lives(pid)]
