"""Pools grow and shrink under load without a lost request; two models, one of them colocated, behind one router."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from serving import Cluster, alive, start_cluster, stop_cluster

DIPTYCH = Path(sys.executable).with_name("diptych")
PATIENCE_S = 300
APART, TOGETHER = "apart", "together"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two echo models: no weights, and every token depends on all KV before it."""
    folder = tmp_path_factory.mktemp("pools")
    small = {"source": "echo", "kv": {"memory_mib": 64}}
    config = {
        "models": {
            APART: small | {"prefill": {"kv": {"memory_mib": 32, "block_tokens": 32}}},
            TOGETHER: small | {"layout": "colocated"},
        },
        "router": {"drain_grace_s": 60},
    }
    file = folder / "diptych.yaml"
    file.write_text(yaml.safe_dump(config))
    running = start_cluster(folder, "--config", str(file))
    yield running
    code = stop_cluster(running)
    assert code == 0, running.printed()
    assert not alive(running.tree)


def scale(cluster: Cluster, model: str, *sizes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DIPTYCH), "scale", model, *sizes, "--url", cluster.url],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def body(number: int, model: str = APART, max_tokens: int = 60) -> dict[str, Any]:
    prompt = [(number * 31 + i) % 1000 for i in range(40 + number % 50)]
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def engines(cluster: Cluster, model: str) -> dict[str, str]:
    return {e["engine"]: e["roles"][0] for e in cluster.get("/info")["engines"] if e["model"] == model}


def text(cluster: Cluster, number: int, model: str) -> str:
    return str(cluster.post("/v1/completions", body(number, model))["choices"][0]["text"])


def test_both_models_are_offered_and_both_layouts_answer_alike(pools: Cluster) -> None:
    assert {card["id"] for card in pools.get("/v1/models")["data"]} == {APART, TOGETHER}
    assert pools.get("/ready")["models"] == {
        APART: {"prefill": 1, "decode": 1},
        TOGETHER: {"prefill": 0, "decode": 1},
    }
    assert set(engines(pools, TOGETHER).values()) == {"decode"}
    assert not any("no prefill engine" in choice for choice in pools.get("/info")["degraded"])
    for number in range(5):
        assert text(pools, number, APART) == text(pools, number, TOGETHER)


def test_growing_and_shrinking_under_load_loses_nothing(pools: Cluster) -> None:
    expected = {number: text(pools, number, TOGETHER) for number in range(20)}
    over = asyncio.Event()
    answers: list[tuple[int, int, str]] = []

    async def client(http: httpx2.AsyncClient, first: int) -> None:
        number = first
        while not over.is_set():
            reply = await http.post("/v1/completions", json=body(number))
            said = reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text
            answers.append((number, reply.status_code, said))
            number = (number + 6) % 20

    async def change() -> list[str]:
        printed = []
        for sizes in (("--decode", "2", "--prefill", "2"), ("--decode", "1", "--prefill", "1"), ("--prefill", "0")):
            done = await asyncio.to_thread(scale, pools, APART, *sizes)
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
            before = len(answers)
            while len(answers) < before + 12:  # noqa: ASYNC110 - requests answered by the new pools
                await asyncio.sleep(0.05)
        over.set()
        return printed

    async def everything() -> list[str]:
        async with httpx2.AsyncClient(base_url=pools.url, timeout=PATIENCE_S) as http, asyncio.TaskGroup() as group:
            for first in range(6):
                group.create_task(client(http, first))
            changing = group.create_task(change())
        return changing.result()

    grown, shrunk, none = asyncio.run(everything())
    assert "decode-2 is ready" in grown
    assert "prefill-1 is ready" in grown
    assert shrunk.count("has finished its requests and ended") == 2
    assert "has finished its requests and ended" in none
    assert [answer for answer in answers if answer[1] != 200] == []
    assert {number: said for number, _, said in answers} == {n: expected[n] for n, _, _ in answers}
    assert set(engines(pools, APART).values()) == {"decode"}
    assert any("no prefill engine" in choice for choice in pools.get("/info")["degraded"])
    assert "died" not in pools.printed()
    done = scale(pools, APART, "--prefill", "1")
    assert "prefill-0 is ready" in done.stdout, done.stderr


def test_impossible_sizes_are_refused_with_a_sentence(pools: Cluster) -> None:
    before = engines(pools, APART)
    for model, sizes, words in (
        (APART, ("--decode", "0"), "needs at least 1 engine"),
        (APART, ("--decode", "100000"), "not enough memory for 99999 more engines"),
        (TOGETHER, ("--prefill", "1"), "has no prefill pool; it has decode"),
        ("nobody", ("--decode", "2"), f"is not served; served here: {APART}, {TOGETHER}"),
        (APART, (), "say what to change"),
    ):
        done = scale(pools, model, *sizes)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert engines(pools, APART) == before
