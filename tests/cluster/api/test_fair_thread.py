"""Tenants take turns at work that takes long: guards against one that sends many long texts and holds up all others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import httpx2

from diptych.cluster.api.fair_thread import TENANT, FairThread
from diptych.cluster.api.testing import front_door


async def test_who_brings_one_piece_of_work_waits_for_one_at_most() -> None:
    thread, go, done = FairThread("test"), threading.Event(), list[str]()

    def work(tenant: str) -> Callable[[], None]:
        def note() -> None:
            go.wait(30)
            done.append(tenant)

        return note

    async def ask(tenant: str) -> None:
        TENANT.set(tenant)
        await thread.run(work(tenant))

    asked = [asyncio.create_task(ask("many")) for _ in range(20)]
    await asyncio.sleep(0)
    asked += [asyncio.create_task(ask("few")) for _ in range(2)]
    leaving = asyncio.create_task(ask("gone"))
    await asyncio.sleep(0)
    leaving.cancel()
    go.set()
    await asyncio.gather(*asked)
    assert done[:5] == ["many", "many", "few", "many", "few"]
    assert done.count("many") == 20
    thread.close()


async def test_a_tenants_texts_are_tokenised_in_its_turn() -> None:
    """The tenant of the request, of routes that count against limits and of those that do not."""
    seen: list[str] = []

    class Noting(FairThread):
        async def run(self, work: Callable[[], object]) -> object:  # type: ignore[override]
            seen.append(TENANT.get())
            return await super().run(work)

    long = "hello world " * 1000
    async with front_door() as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        door.served.renderer._thread = Noting("test")
        for path in ("/v1/tokenize", "/v1/completions"):
            await http.post(path, json={"model": "echo", "prompt": long}, headers={"x-tenant": path})
    assert seen == ["/v1/tokenize", "/v1/completions"]
