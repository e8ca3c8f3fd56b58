"""Embeddings from a real cluster: engines as actors, one of which is killed while it works.

Guards: an actor that is not the engine of its role; a request that waits for a process that is no more; a pool that
does not come back; a second model that is served beside.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import yaml
from serving import Cluster, alive, descendants, start_cluster, stop_cluster
from text_cluster import make_encoder

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PATIENCE_S = 120
TEXTS = ["the cat sat on the mat", "a dog ran in the park", "the sky is blue"] * 100


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("embeddings")
    encoder = make_encoder(folder / "encoder")
    slow = {"point": "engine.step", "action": "delay", "delay_s": 0.2, "probability": 1.0, "engine": "embed-*"}
    config = {
        "models": {
            "encoder": {"source": str(encoder), "embed": {"engines": 2, "step_tokens": 256}},
            "echo": {"source": "echo", "layout": "colocated", "kv": {"memory_mib": 32}},
        },
        "faults": {"rules": [slow]},
    }
    file = folder / "diptych.yaml"
    file.write_text(yaml.safe_dump(config))
    running = start_cluster(folder, "--config", str(file))
    yield running
    running.tree |= descendants(running.process.pid)
    code = stop_cluster(running)
    assert code == 0, running.printed()
    assert not alive(running.tree)


def until_true(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.05)


def engines(cluster: Cluster) -> dict[str, dict[str, Any]]:
    found = cluster.get("/info")["engines"]
    return {engine["engine"]: engine for engine in found if engine["connected"] and engine["model"] == "encoder"}


def vectors(cluster: Cluster) -> np.ndarray[Any, Any]:
    answer = cluster.post("/v1/embeddings", {"model": "encoder", "input": TEXTS})
    return np.asarray([entry["embedding"] for entry in answer["data"]])


def test_a_killed_engines_requests_are_answered_and_it_comes_back(own: Cluster) -> None:
    whole = vectors(own)
    before = engines(own)
    assert set(before) == {"embed-0", "embed-1"}
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(vectors, own) for _ in range(6)]
        until_true(lambda: all(engine["running"] for engine in engines(own).values()))
        os.kill(before["embed-0"]["pid"], signal.SIGKILL)
        for answer in asked:
            np.testing.assert_allclose(answer.result(), whole, atol=1e-5)
    until_true(lambda: set(engines(own)) == {"embed-0", "embed-1"})
    assert engines(own)["embed-0"]["epoch"] > before["embed-0"]["epoch"]


def test_a_model_that_generates_is_served_beside(own: Cluster) -> None:
    cards = {card["id"]: card["capabilities"] for card in own.get("/v1/models")["data"]}
    assert cards["encoder"]["task"] == "embed"
    answer = own.post("/v1/completions", {"model": "echo", "prompt": "t1 t2", "max_tokens": 2})
    assert answer["choices"][0]["finish_reason"] == "length"
