"""Every request waits for a look at the keys: nobody's reads hold it up, nor does a database that says nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection

from diptych.cluster import keys as keys_module
from diptych.cluster.keys import LOOK_S, ApiKeys, make_key, row_of
from diptych.cluster.router.rig import until
from diptych.cluster.store import keys as rows
from diptych.cluster.store.database import Store
from diptych.cluster.store.testing import temporary_store


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_no_tenants_reads_hold_up_the_look_at_keys() -> None:
    """Every request waits for that look: who keeps all readers busy would hold up everybody."""
    go = threading.Event()
    async with temporary_store() as store:
        keys = ApiKeys(None, store)
        slow = [asyncio.create_task(store.read(lambda _: go.wait(30))) for _ in range(50)]
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(10):
                await keys.start()
            assert not any(task.done() for task in slow)
        finally:
            go.set()
            await asyncio.gather(*slow)


async def test_a_store_that_hangs_holds_up_the_first_who_ask_and_nobody_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A database behind a broken network says nothing for hours, and every request waits for the look at keys."""
    monkeypatch.setattr(keys_module, "PATIENCE_S", 0.05)
    clock, go, hangs = Clock(), threading.Event(), False
    shown, key = make_key("a")

    class Hanging(Store):
        async def read_first(self, job: Callable[[Connection], Any]) -> Any:
            if hangs:
                await asyncio.to_thread(go.wait, 30)
            return await super().read_first(job)

    async with temporary_store() as store:
        store.__class__ = Hanging
        await store.write(lambda connection: rows.add(connection, row_of(key)))
        keys = ApiKeys(None, store, clock=clock)
        await keys.start()
        hangs = True
        clock.now += LOOK_S
        async with asyncio.timeout(20):
            await asyncio.gather(*(keys.look() for _ in range(9)))
            assert keys.holder(shown.encode()) == key
            assert "those from before still hold" in keys.fault
            monkeypatch.setattr(keys_module, "PATIENCE_S", 60)
            for _ in range(9):
                clock.now += LOOK_S
                await keys.look()
                assert keys.holder(shown.encode()) == key
            await store.write(lambda connection: rows.disable(connection, key.id))
            go.set()
            await until(lambda: not keys.fault)
            clock.now += LOOK_S
            await keys.look()
            assert keys.holder(shown.encode()) is None
