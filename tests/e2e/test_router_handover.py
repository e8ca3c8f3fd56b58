"""The router is asked to end, restarted and killed under load: its address stays open throughout."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from serving import Cluster, alive, descendants, start_cluster, stop_cluster

DIPTYCH = Path(sys.executable).with_name("diptych")
PATIENCE_S = 120
MODEL = "echo"
CLIENTS = 10  # of each kind

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("handover")
    config = {
        "models": {MODEL: {"source": "echo", "kv": {"memory_mib": 32}}},
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


@dataclass(frozen=True)
class Failure:
    kind: str
    began: float  # on the monotonic clock
    what: str


@dataclass
class Load:
    """Streams without pause: on connections that are kept, on one each, and through Ray Serve's proxy."""

    cluster: Cluster
    expected: dict[int, str]
    failures: list[Failure] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("kept", "new", "serve"), 0))

    async def ask(self, http: httpx2.AsyncClient, kind: str, number: int) -> None:
        began, said = time.monotonic(), ""
        try:
            async with http.stream("POST", "/v1/completions", json=body(number) | {"stream": True}) as reply:
                async for line in reply.aiter_lines():
                    if reply.status_code != 200 or '"error"' in line:
                        said += f"{reply.status_code} {line}"
                    elif line.startswith("data: {"):
                        said += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        except httpx2.HTTPError as exc:
            said += repr(exc)
        self.answers[kind] += 1
        if said != self.expected[number]:
            self.failures.append(Failure(kind, began, said[-300:]))

    async def kept(self, number: int) -> None:
        async with httpx2.AsyncClient(base_url=self.cluster.url, timeout=PATIENCE_S) as http:
            while True:
                await self.ask(http, "kept", number)

    async def new(self, number: int) -> None:
        while True:
            async with httpx2.AsyncClient(base_url=self.cluster.url, timeout=PATIENCE_S) as http:
                await self.ask(http, "new", number)

    async def serve(self, number: int) -> None:
        [line] = [line for line in self.cluster.printed().splitlines() if "(the same through Ray Serve)" in line]
        async with httpx2.AsyncClient(base_url=line.split()[0], timeout=PATIENCE_S) as http:
            while True:
                await self.ask(http, "serve", number)

    async def more(self, count: int) -> None:
        """Until each kind of client had `count` answers more for each of its clients."""
        before = dict(self.answers)
        await until(lambda: all(self.answers[kind] >= before[kind] + count for kind in before), "answers do not come")


def body(number: int) -> dict[str, Any]:
    prompt = [(number * 31 + i) % 1000 for i in range(40)]
    return {"model": MODEL, "prompt": prompt, "max_tokens": 150, "temperature": 0, "ignore_eos": True}


def router(cluster: Cluster) -> int:
    """The pid of a replica that answers."""
    return int(cluster.get("/info")["routers"][0]["pid"])


async def until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, message
        await asyncio.sleep(0.1)


@asynccontextmanager
async def load(cluster: Cluster) -> AsyncIterator[Load]:
    expected = {}
    for number in range(CLIENTS):
        reply = await asyncio.to_thread(cluster.post, "/v1/completions", body(number))
        expected[number] = str(reply["choices"][0]["text"])
    made = Load(cluster, expected)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(kind(n)) for kind in (made.kept, made.new) for n in range(CLIENTS)]
        tasks += [group.create_task(made.serve(n)) for n in range(2)]
        try:
            await made.more(CLIENTS)
            yield made
            await made.more(CLIENTS)
        finally:
            for task in tasks:
                task.cancel()


def under_load(cluster: Cluster, change: Callable[[Load], Awaitable[None]]) -> Load:
    async def everything() -> Load:
        async with load(cluster) as made:
            await change(made)
        return made

    return asyncio.run(everything())


def died_and_handed_over(cluster: Cluster) -> dict[str, float]:
    lines = [line for line in cluster.text("/metrics").splitlines() if "replicas_before_total{" in line]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def test_sigterm_of_the_router_fails_no_request(own: Cluster) -> None:
    """Its answers end, what is open is served on, and connections go to the next replica."""
    old = router(own)

    async def change(made: Load) -> None:
        async with (
            httpx2.AsyncClient(base_url=own.url, timeout=PATIENCE_S) as probe,
            httpx2.AsyncClient(base_url=own.url, timeout=PATIENCE_S) as idle,
        ):
            for http in (probe, idle):
                assert (await http.get("/ready")).status_code == 200
            os.kill(old, signal.SIGTERM)
            while (reply := await probe.get("/ready")).status_code == 200:
                await asyncio.to_thread(time.sleep, 0.02)
            assert reply.status_code == 503
            assert reply.json()["models"][MODEL]["decode"] == 1
            await until(lambda: not alive({old}), "the old replica does not end")
            assert (await idle.get("/ready")).status_code == 200

    made = under_load(own, change)
    assert made.failures == []
    assert router(own) != old
    assert died_and_handed_over(own) == {"died": 0, "handed_over": 1}


def test_a_restart_replaces_engines_and_router_and_fails_no_request(own: Cluster) -> None:
    old = router(own)

    async def change(made: Load) -> None:
        done = await asyncio.to_thread(
            subprocess.run,
            [str(DIPTYCH), "restart", "--url", own.url],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "2 engines started, 2 ended" in done.stdout
        assert f"the router is another process (pid {router(own)}, before {old})" in done.stdout
        await until(lambda: not alive({old}), "the old replica does not end")

    made = under_load(own, change)
    assert made.failures == []
    assert died_and_handed_over(own) == {"died": 0, "handed_over": 2}


def test_a_killed_router_breaks_what_it_has_in_work_and_refuses_nothing(own: Cluster) -> None:
    old = router(own)
    killed = 0.0

    async def change(made: Load) -> None:
        nonlocal killed
        os.kill(old, signal.SIGKILL)
        await until(lambda: not alive({old}), "the killed one does not end")  # until then it has its connections
        killed = time.monotonic()
        await until(lambda: router(own) != old, "no other router")

    made = under_load(own, change)
    assert len(made.failures) <= 2 * CLIENTS + 2
    assert [failure for failure in made.failures if failure.began > killed] == []
    assert [failure for failure in made.failures if "ConnectError" in failure.what] == []
    assert died_and_handed_over(own) == {"died": 1, "handed_over": 2}


def orders(cluster: Cluster) -> float:
    """That the decode engines took, ever."""
    lines = cluster.text("/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("diptych_engine_decode_requests_total{"))


def orders_at_rest(cluster: Cluster) -> float:
    """The same, once two readings farther apart than the engines' reports are equal."""
    before, now = -1.0, orders(cluster)
    while before != now:
        time.sleep(1.5)
        before, now = now, orders(cluster)
    return now


def retried(cluster: Cluster, asked: dict[str, Any], key: str) -> tuple[httpx2.Response, float]:
    """The answer to a request that is sent until there is one, as `Retry-After` says, and how long that took."""
    began = time.monotonic()
    with httpx2.Client(base_url=cluster.url, timeout=PATIENCE_S) as http:
        while time.monotonic() - began < PATIENCE_S:
            try:
                reply = http.post("/v1/completions", json=asked, headers={"Idempotency-Key": key})
            except httpx2.TransportError:
                continue
            if reply.status_code not in (409, 503):
                break
            time.sleep(float(reply.headers["retry-after-ms"]) / 1000)
    return reply, time.monotonic() - began


@pytest.mark.parametrize("when", ["amid its answer", "behind it"])
def test_a_killed_routers_request_is_worked_on_once_more_at_most(own: Cluster, when: str) -> None:
    """R04 on the served binary: retried with its Idempotency-Key at the next router, it is answered once for all, by
    what was kept where the answer had gone out. Guards against work, and a bill, that doubles with each retry.
    """
    asked = body(77) | {"max_tokens": 1500, "stream": True}
    old, before, first = router(own), orders_at_rest(own), b""
    with (
        httpx2.Client(base_url=own.url, timeout=PATIENCE_S) as http,
        http.stream("POST", "/v1/completions", json=asked, headers={"Idempotency-Key": when}) as stream,
    ):
        for piece in stream.iter_bytes() if when == "behind it" else ():
            first += piece
        os.kill(old, signal.SIGKILL)
    reply, waited = retried(own, asked, when)
    assert reply.status_code == 200
    assert waited < 30  # the lease of the dead router, and the next one's start
    assert ("idempotent-replayed" in reply.headers) == (when == "behind it")
    assert first in (b"", reply.content)
    assert reply.text.endswith("data: [DONE]\n\n")
    for _ in range(3):
        again, _ = retried(own, asked, when)
        assert again.content == reply.content
        assert again.headers["idempotent-replayed"] == "true"
    wanted = before + (2 if when == "amid its answer" else 1)
    asyncio.run(until(lambda: orders(own) >= wanted, "the engines do not tell what they took"))
    assert orders(own) == wanted
