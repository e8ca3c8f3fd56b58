"""For tests: a front door whose batches a test works on itself, and a target whose answers it decides."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.keys import Key
from diptych.protos.wire_checks import JsonObject

from .runner import BatchRunner
from .targets import Attempt

CHAT = "/v1/chat/completions"
WAIT_S = 30
OVER = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, text: str = "hello", url: str = CHAT, **more: Any) -> dict[str, Any]:
    """A request for the echo model."""
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@dataclass
class Bench:
    """The door, a client of it, and a clock of the batches that a test can turn on."""

    door: FrontDoor
    http: httpx2.AsyncClient
    later_s: float = 0.0
    runners: list[BatchRunner] = field(default_factory=list)

    def clock(self) -> float:
        """Seconds since 1970, and what a test added."""
        return time.time() + self.later_s

    def runner(self, **targets: Any) -> BatchRunner:
        """One that was not started: `look` makes it work."""
        made = BatchRunner(self.door.router, [self.door.served], self.door.store, clock=self.clock)
        made._place.targets.update(targets)
        self.runners.append(made)
        return made

    async def upload(self, lines: Sequence[Any] | bytes, purpose: str = "batch", **headers: str) -> dict[str, Any]:
        """A file."""
        data = lines if isinstance(lines, bytes) else "\n".join(map(json.dumps, lines)).encode()
        reply = await self.http.post(
            "/v1/files", data={"purpose": purpose}, files={"file": ("in.jsonl", data)}, headers=headers
        )
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()
        return told

    async def make(self, lines: Sequence[Any] | bytes, endpoint: str = CHAT, **more: Any) -> dict[str, Any]:
        """A batch of a file of its own."""
        file = await self.upload(lines)
        body = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h", **more}
        reply = await self.http.post("/v1/batches", json=body)
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()
        return told

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """As it is now."""
        reply = await self.http.get(f"/v1/batches/{batch_id}")
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()
        return told

    async def until(
        self, batch_id: str, holds: Callable[[dict[str, Any]], bool], *runners: BatchRunner
    ) -> dict[str, Any]:
        """The batch once `holds`; the runners look after their batches meanwhile."""
        async with asyncio.timeout(WAIT_S):
            while not holds(told := await self.batch(batch_id)):
                for runner in runners:
                    await runner.look()
                await asyncio.sleep(0.01)
        return told

    async def over(self, batch_id: str, *runners: BatchRunner) -> dict[str, Any]:
        """The batch once it has ended."""
        return await self.until(batch_id, lambda told: told["status"] in OVER, *runners)

    async def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        """Of a result."""
        if file_id is None:
            return []
        reply = await self.http.get(f"/v1/files/{file_id}/content")
        assert reply.status_code == 200, reply.text
        return [json.loads(one) for one in reply.text.splitlines()]


@asynccontextmanager
async def batch_bench() -> AsyncIterator[Bench]:
    """One before a new door; its runners are stopped at the end."""
    async with front_door() as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        bench = Bench(door, http)
        yield bench
        for runner in bench.runners:
            await runner.stop()


class Scripted:
    """A target whose answers a test decides: what `script` holds is raised first; `gate` holds up the rest."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.script: dict[str, list[Exception]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = self.most_running = 0
        self.placed = True

    def check(self, body: bytes) -> str:
        """All bodies are right."""
        return "echo"

    def attempt(self, tenant: str, key: Key | None = None) -> Attempt:
        """As if an engine had it, where `placed`."""
        made = Attempt(tenant, CHAT, "chatcmpl-", 0.0, key)
        if self.placed:
            made.tracked.lives.append(_Placed())  # type: ignore[arg-type]
        return made

    async def answer(self, body: bytes, attempt: Attempt, tenant: str) -> JsonObject:
        """By the script."""
        text = json.loads(body)["messages"][0]["content"]
        self.begun.append(text)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.script.get(text):
                raise self.script[text].pop(0)
            await self.gate.wait()
        finally:
            self.running -= 1
        return {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}, "said": text}


class _Placed:
    num_placements = 1
    num_tokens = 0
