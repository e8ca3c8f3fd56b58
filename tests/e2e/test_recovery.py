"""Engines die, are asked to end and are replaced under load on a real cluster: every answer stays the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from serving import Cluster, alive, descendants, start_cluster, stop_cluster

DIPTYCH = Path(sys.executable).with_name("diptych")
PATIENCE_S = 120
MODEL = "echo"
STREAMS = 10

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Echo: no weights, and one wrong block of KV changes every token after it."""
    folder = tmp_path_factory.mktemp("recovery")
    config = {
        "models": {MODEL: {"source": "echo", "kv": {"memory_mib": 32}, "decode": {"engines": 2}}},
        "router": {"drain_grace_s": 60},
    }
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


def body(number: int) -> dict[str, Any]:
    prompt = [(number * 31 + i) % 1000 for i in range(40)]
    return {"model": MODEL, "prompt": prompt, "max_tokens": 300, "temperature": 0, "ignore_eos": True}


async def until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, message
        await asyncio.sleep(0.1)


async def streamed(http: httpx2.AsyncClient, number: int) -> str:
    """The text of one stream, or what went wrong with it."""
    parts = []
    async with http.stream("POST", "/v1/completions", json=body(number) | {"stream": True}) as reply:
        async for line in reply.aiter_lines():
            if reply.status_code != 200:
                parts.append(f"{reply.status_code} {line}")
            elif line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                parts.append(str(event["error"]) if "error" in event else event["choices"][0]["text"])
    return "".join(parts)


def under_load(cluster: Cluster, change: Callable[[], Awaitable[None]]) -> None:
    """Streams run before, during and after `change`; each must be what it is on a quiet cluster."""
    expected = {n: str(cluster.post("/v1/completions", body(n))["choices"][0]["text"]) for n in range(STREAMS)}
    over = asyncio.Event()
    wrong: list[tuple[int, str]] = []
    counts = [0] * STREAMS

    async def client(http: httpx2.AsyncClient, number: int) -> None:
        while not over.is_set():
            said = await streamed(http, number)
            counts[number] += 1
            if said != expected[number]:
                wrong.append((number, said[-300:]))

    async def everything() -> None:
        async with httpx2.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as http, asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(client(http, number))
            try:
                await until(lambda: min(counts) >= 1, "the streams do not end")
                await change()
                before = sum(counts)
                await until(lambda: sum(counts) >= before + STREAMS, "the streams do not go on")
            finally:
                over.set()

    asyncio.run(everything())
    assert wrong == [], cluster.printed()[-2000:]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_an_engine_that_dies_or_hangs_is_replaced_and_no_stream_differs(
    own: Cluster, role: str, how: signal.Signals
) -> None:
    before = engines(own)
    name = next(name for name in sorted(before) if name.startswith(role))

    async def change() -> None:
        os.kill(before[name]["pid"], how)
        await until(lambda: name in (now := engines(own)) and now[name]["epoch"] > before[name]["epoch"], "not back")

    under_load(own, change)
    assert set(engines(own)) == set(before)
    assert not alive({before[name]["pid"]})
    assert f"engine {name} serves again, in epoch {engines(own)[name]['epoch']}" in own.printed()


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_an_engine_that_gets_sigterm_goes_when_another_serves(own: Cluster, role: str) -> None:
    before = engines(own)
    name = next(name for name in sorted(before) if name.startswith(role))

    async def change() -> None:
        os.kill(before[name]["pid"], signal.SIGTERM)
        await until(lambda: not alive({before[name]["pid"]}), "it did not end")

    under_load(own, change)
    after = engines(own)
    assert name not in after
    assert len(after) == len(before)


def test_a_restart_replaces_every_engine_under_load(own: Cluster) -> None:
    before = engines(own)

    async def change() -> None:
        done = await asyncio.to_thread(
            subprocess.run,
            [str(DIPTYCH), "restart", "--url", own.url],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "3 engines started, 3 ended" in done.stdout

    under_load(own, change)
    after = engines(own)
    assert len(after) == 3
    assert not {e["epoch"] for e in before.values()} & {e["epoch"] for e in after.values()}


def test_an_engine_that_changes_its_role_under_load_loads_nothing_again(own: Cluster) -> None:
    before = engines(own)
    name = max(name for name in before if before[name]["roles"] == ["decode"])

    async def role(wanted: str) -> None:
        done = await asyncio.to_thread(
            subprocess.run,
            [str(DIPTYCH), "role", name, wanted, "--url", own.url],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert engines(own)[name]["roles"] == [wanted]

    async def change() -> None:
        await role("prefill")
        await role("decode")

    under_load(own, change)
    assert {n: e["pid"] for n, e in engines(own).items()} == {n: e["pid"] for n, e in before.items()}


def test_a_restart_of_what_is_not_served_is_refused_with_a_sentence(own: Cluster) -> None:
    for options, words in ((("nobody",), "the model nobody is not served"), (("--role", "both"), "is no role")):
        done = subprocess.run(
            [str(DIPTYCH), "restart", *options, "--url", own.url], capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_killed_manager_comes_back_and_goes_on_replacing_what_dies(own: Cluster) -> None:
    def manager() -> set[int]:
        return {int(line.split()[0]) for line in alive(descendants(own.process.pid)) if "PoolManagerActor" in line}

    before, [old] = engines(own), manager()
    name = next(name for name in sorted(before) if name.startswith("decode"))

    async def change() -> None:
        os.kill(old, signal.SIGKILL)
        os.kill(before[name]["pid"], signal.SIGKILL)
        await until(lambda: name in (now := engines(own)) and now[name]["epoch"] > before[name]["epoch"], "not back")

    under_load(own, change)
    assert manager() != {old}
    assert {n: e["epoch"] for n, e in engines(own).items() if n != name} == {
        n: e["epoch"] for n, e in before.items() if n != name
    }, "what lived was adopted, not replaced"
