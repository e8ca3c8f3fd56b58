"""A stranger drives the rig by its command line alone: it starts, describes, hits, reads and stops a cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from procfs import descendants, lives
from rig import Rig, RigError, attach, make_keys, start

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


def test_headers_are_those_of_the_key_and_of_the_tenant_where_there_is_none(tmp_path: Path) -> None:
    here = Rig("http://127.0.0.1:1", "echo", "echo", tmp_path, os.getpid())
    assert here.headers("a") == {"x-tenant": "a"}
    assert here.headers("admin") == {}
    with pytest.raises(RigError):
        here.headers("c")
    with pytest.raises(RigError, match="does not answer"):
        here.processes()
    here.keys = {"a": "k"}
    assert here.headers("a") == {"authorization": "Bearer k"}


def test_the_keys_that_are_handed_out_are_those_of_the_file(tmp_path: Path) -> None:
    """The file is the product's: it must take it, and find each tenant behind its key."""
    from diptych.cluster.keys import USUAL_SCOPES, ApiKeys, Scope

    keys = make_keys(tmp_path / "keys.jsonl")
    known = ApiKeys(tmp_path / "keys.jsonl")
    found = {who: known.holder(key.encode()) for who, key in keys.items()}
    opened = {who: (key.tenant, key.scopes) for who, key in found.items() if key is not None}
    assert opened == {"a": ("a", USUAL_SCOPES), "b": ("b", USUAL_SCOPES), "admin": ("admin", set(Scope))}
    here = Rig("http://127.0.0.1:1", "echo", "echo", tmp_path, 5, keys)
    here.save()
    assert (tmp_path / "rig.json").stat().st_mode & 0o077 == 0


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


def status(url: str, path: str, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as exc:
        return exc.code


def check_the_keys(folder: Path, told: dict[str, Any]) -> None:
    """At the router's own listener and at Ray Serve's proxy: no key, a tenant's and the admin's on every page."""
    served = re.search(r"(http://\S+)\s+\(the same through Ray Serve\)", attach(folder).log.read_text())
    assert served
    for url in (told["url"], served[1]):
        for path, wanted in (
            ("/health", (200, 200, 200, 200)),
            ("/ready", (200, 200, 200, 200)),
            ("/v1/models", (401, 200, 200, 200)),
            ("/info", (401, 403, 403, 200)),
            ("/metrics", (401, 403, 403, 200)),
            ("//info", (401, 404, 404, 404)),
            ("/admin", (401, 404, 404, 404)),
        ):
            shown = [{}, *(told["headers"][who] for who in ("a", "b", "admin"))]
            assert tuple(status(url, path, headers) for headers in shown) == wanted, (url, path)
        assert status(url, "/v1/models", told["headers"]["a"] | {"x-tenant": "b"}) == 403
    assert "prefill-0" in attach(folder).command("status")
    written = "".join(path.read_text() for path in folder.iterdir() if path.name != "rig.json" and path.is_file())
    assert not [key for key in told["keys"].values() if key in written]


@pytest.mark.ray
@pytest.mark.slow
def test_an_exam_can_do_all_it_needs_and_nothing_is_left_behind(folder: Path) -> None:
    told = rig(folder, "describe")
    names = {process["name"] for process in told["processes"]}
    assert {"prefill-0", "prefill-1", "decode-0", "decode-1", "router-0", "manager"} <= names
    assert "# HELP" in attach(folder).text("/metrics")
    page = attach(folder).text("/metrics")
    assert all(name in page for name in told["gauges"].values())

    check_the_keys(folder, told)

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
