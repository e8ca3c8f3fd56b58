"""Processes are killed under load: no request hangs, the rest of the cluster goes on, nothing outlives the command."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import Cluster, alive, descendants, start_cluster, stop_cluster

from diptych.cluster.models import ModelFolder

MODEL = "smollm2-135m-instruct"
PATIENCE_S = 60

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def own(default_model: ModelFolder, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that the test may ruin: engines that die in it stay away."""
    options = (f"models.{MODEL}.dtype=float32", "engines.restart=false")
    running = start_cluster(tmp_path, *(word for option in options for word in ("--set", option)))
    yield running
    stop_cluster(running)
    until(lambda: not alive(running.tree), f"left behind: {alive(running.tree)}")


def until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


def body(max_tokens: int, **fields: Any) -> dict[str, Any]:
    base = {"model": MODEL, "prompt": "Once upon a time there was", "temperature": 0, "ignore_eos": True}
    return base | {"max_tokens": max_tokens} | fields


def pids(cluster: Cluster) -> dict[str, int]:
    info = cluster.get("/info")
    engines = {role: engine["pid"] for engine in info["engines"] for role in engine["roles"]}
    return engines | {"router": info["routers"][0]["pid"]}


def text(cluster: Cluster, max_tokens: int) -> str:
    return str(cluster.post("/v1/completions", body(max_tokens))["choices"][0]["text"])


def nothing_held(cluster: Cluster) -> bool:
    engines = cluster.get("/info")["engines"]
    return all(e["blocks"]["used"] == e["running"] == e["transfers"] == e["ring_slots_busy"] == 0 for e in engines)


def events_until(cluster: Cluster, max_tokens: int, at: int, act: Callable[[], None]) -> list[str]:
    """The data of all events of a stream; `act` is called after event `at`."""
    events: list[str] = []
    with httpx2.stream(
        "POST", cluster.url + "/v1/completions", json=body(max_tokens, stream=True), timeout=PATIENCE_S
    ) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == at:
                    act()
    return events


def test_without_the_prefill_engine_the_same_answer_comes_from_local_prefill(own: Cluster) -> None:
    expected = text(own, 40)
    prefill = pids(own)["prefill"]
    streamed = events_until(own, 40, 5, lambda: os.kill(prefill, signal.SIGKILL))
    assert streamed[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["text"] for e in streamed[:-1]) == expected
    assert text(own, 40) == expected
    assert own.get("/ready")["models"][MODEL] == {"prefill": 0, "decode": 1}
    assert any("no prefill engine" in choice for choice in own.get("/info")["degraded"])
    until(lambda: nothing_held(own), "blocks or transfers are still held")
    assert "Traceback" not in own.printed()


def test_a_router_that_dies_comes_back_at_the_same_address_and_the_engines_let_go(own: Cluster) -> None:
    expected = text(own, 20)
    router = pids(own)["router"]
    with pytest.raises(httpx2.HTTPError):
        events_until(own, 500, 3, lambda: os.kill(router, signal.SIGKILL))

    def ready() -> bool:
        try:
            return httpx2.get(own.url + "/ready", timeout=5).status_code == 200
        except httpx2.HTTPError:
            return False

    until(ready, "the router did not come back")
    assert pids(own)["router"] != router
    assert text(own, 20) == expected
    until(lambda: nothing_held(own), "the engines still hold what the dead router asked for")
    own.tree |= descendants(own.process.pid)


def test_without_the_decode_engine_streams_end_in_an_error_and_new_requests_are_refused(own: Cluster) -> None:
    decode = pids(own)["decode"]
    last = json.loads(events_until(own, 500, 5, lambda: os.kill(decode, signal.SIGKILL))[-1])
    assert last["error"]["code"] == "engine_lost"
    assert last["error"]["type"] == "server_error"

    reply = httpx2.post(own.url + "/v1/completions", json=body(5), timeout=PATIENCE_S)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "engine_lost"
    assert httpx2.get(own.url + "/ready").status_code == 503
    assert httpx2.get(own.url + "/health").status_code == 200
    until(lambda: nothing_held(own), "the prefill engine still holds blocks")
    until(lambda: "engine decode-0" in own.printed(), "nobody told the terminal")
    assert "engines.restart is off; `diptych scale` starts another" in own.printed()
    assert "Traceback" not in own.printed()


def test_nothing_outlives_a_killed_command(own: Cluster) -> None:
    own.process.kill()
    own.process.wait(PATIENCE_S)
    until(lambda: not alive(own.tree), f"left behind: {alive(own.tree)}")


def test_sigterm_while_the_engines_load_ends_in_order(default_model: ModelFolder, tmp_path: Path) -> None:
    starting = start_cluster(tmp_path, wait=False)
    until(lambda: "engines ..." in starting.printed(), "the engines did not begin to load")
    starting.tree = descendants(starting.process.pid)
    assert stop_cluster(starting, signal.SIGTERM) == 130, starting.printed()
    assert "interrupted" in starting.printed()
    assert "SIGTERM received" not in starting.printed()
    until(lambda: not alive(starting.tree), f"left behind: {alive(starting.tree)}")
