"""A deadline counts from the arrival, whatever the request waits for; nothing is computed for it later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cluster.config import LimitSettings, RouterSettings
from diptych.cluster.router.rig import D, P, Rig, call, rig, until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import StaticDirectory
from diptych.protos.errors import DeadlineExceeded
from diptych.protos.types import Role

LATE_S = 0.25  # the most that an answer may come after its deadline, and a step begin
TIMEOUT_S = 0.5
FOUR = {"p0": P, "p1": P, "d0": D, "d1": D}


@pytest.mark.parametrize(("spent_s", "is_late"), [(4.9, False), (5.0, True), (60.0, True)])
async def test_what_passed_since_the_arrival_counts(spent_s: float, is_late: bool) -> None:
    """On a clock of its own: who has expired is refused before it is placed, others wait for what is left."""
    now = 1000.0
    directory = StaticDirectory()
    directory.is_settled.clear()
    router = Router(directory=directory, settings=RouterSettings(connect_timeout_s=3600), clock=lambda: now)
    await router.start()
    asked = router.generate(replace(call(timeout_s=5), arrived_at=now - spent_s))
    waiting = asyncio.ensure_future(anext(asked))
    if not is_late:
        await until(lambda: router.admission.running == 1)
        now += 0.1
    with pytest.raises(DeadlineExceeded):
        await waiting
    page = router.metrics.render().decode()
    assert not is_late or 'reason="deadline_exceeded"' in page
    assert "engine_lost" not in page, "no engine was"
    await router.stop()


async def test_the_routers_own_limit_counts_from_the_arrival_too(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, limits=LimitSettings(request_timeout_s=30)) as r:
        with pytest.raises(DeadlineExceeded):
            await r.deltas(replace(call(), arrived_at=r.router.clock() - 31))
        assert not r.engines["d"].orders
        assert await r.deltas(replace(call(), arrived_at=r.router.clock() - 1))


class Lag:
    """How long this loop stood: what a busy machine adds to every moment."""

    longest_s = 0.0

    async def watch(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            self.longest_s = max(self.longest_s, time.monotonic() - began - 0.005)


@asynccontextmanager
async def watched(folder: Path, roles: dict[str, frozenset[Role]], step_s: float) -> AsyncIterator[tuple[Rig, Lag]]:
    """A rig of slow engines."""
    lag = Lag()
    task = asyncio.create_task(lag.watch())
    try:
        limits = LimitSettings(max_running=1, request_timeout_s=30)
        async with rig(folder, roles, step_s=step_s, limits=limits, retry_burst=8) as r:
            yield r, lag
    finally:
        task.cancel()


async def expires(r: Rig, lag: Lag) -> int:
    """A request with a deadline that it cannot meet ends in time, and so does all work on it. Its tokens."""
    began, got = time.monotonic(), 0

    async def read() -> None:
        nonlocal got
        async for delta in r.router.generate(replace(call(10_000, timeout_s=TIMEOUT_S), arrived_at=began)):
            got += len(delta.tokens)

    with pytest.raises(DeadlineExceeded):
        await read()
    assert time.monotonic() - began <= TIMEOUT_S + LATE_S + lag.longest_s
    await until(lambda: all(engine.open_orders == 0 for engine in r.engines.values()))
    assert all(engine.stepped_at <= began + TIMEOUT_S + LATE_S + lag.longest_s for engine in r.engines.values())
    return got


async def test_in_the_queue(tmp_path: Path) -> None:
    async with watched(tmp_path, {"d": D}, 0.02) as (r, lag):
        before = asyncio.create_task(r.ask(1000))
        await until(lambda: r.router.admission.running == 1)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await r.deltas(call(timeout_s=TIMEOUT_S))
        assert time.monotonic() - began <= TIMEOUT_S + LATE_S + lag.longest_s
        assert len(r.engines["d"].orders) == 1
        before.cancel()
        await asyncio.gather(before, return_exceptions=True)


async def test_in_a_slow_prefill(tmp_path: Path) -> None:
    async with watched(tmp_path, {"p": P, "d": D}, 5.0) as (r, lag):
        assert await expires(r, lag) == 0


async def test_in_slow_decode_steps(tmp_path: Path) -> None:
    async with watched(tmp_path, FOUR, 0.02) as (r, lag):
        assert await expires(r, lag) > 0


async def test_in_a_move(tmp_path: Path) -> None:
    async with watched(tmp_path, {"d0": D, "d1": D}, 0.02) as (r, lag):
        for engine in r.engines.values():
            engine.faults.dies_at = 4
        assert await expires(r, lag) > 0
        assert len(r.router.losses) == 2
