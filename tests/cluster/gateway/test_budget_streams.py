"""200 streams at once against a budget for 100, and routers that are killed with kill -9 over one store."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from journeys import gateway, read
from paying_router import run_router
from tills import MICRO, budget_of, ledger_of, settings_of

from diptych.cluster.gateway.accounts import BudgetExceeded
from diptych.cluster.gateway.books import AccountId, Books, MemoryBooks
from diptych.cluster.gateway.record import AttemptRecord
from diptych.cluster.gateway.stored_books import StoredBooks
from diptych.cluster.gateway.testing import ScriptedTarget, says
from diptych.cluster.providers.terms import Terms
from diptych.cluster.store import budgets, spend
from diptych.cluster.store.database import open_store
from diptych.cluster.store.testing import prepared, temporary_store
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Event

ALL = AccountId("all", "", "")
TOKENS = 10  # of a stream, asked for and used
STREAMS = 200
PAID = 100  # so many of them are paid for


class Gate(ScriptedTarget):
    """Lets all calls begin, and answers when it is opened."""

    def __init__(self, opened: asyncio.Event, seen: asyncio.Semaphore) -> None:
        super().__init__("p/a", [says(*("x" for _ in range(TOKENS)))])
        self.opened = opened
        self.seen = seen

    async def stream(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> AsyncGenerator[Event, None]:
        self.seen.release()
        await self.opened.wait()
        async for event in super().stream(request, terms, record):
            yield event


@pytest.mark.parametrize("num_routers", [1, 4])
@pytest.mark.parametrize("kind", ["memory", "store"])
async def test_200_streams_against_a_budget_for_100(kind: str, num_routers: int) -> None:
    """Gateways that charge afterwards let all 200 through. Nothing is overspent here, and no more than a lease of each
    router is left over.
    """
    async with AsyncExitStack() as stack:
        books: Books = MemoryBooks()
        if kind == "store":
            books = StoredBooks(await stack.enter_async_context(temporary_store()))
        settings = settings_of(budgets=budget_of(PAID * TOKENS, period="total"))
        ledgers = [await stack.enter_async_context(ledger_of(settings, books)) for _ in range(num_routers)]
        opened, seen = asyncio.Event(), asyncio.Semaphore(0)
        targets = [Gate(opened, seen) for _ in ledgers]
        gates = [gateway(target, ports={"ledger": ledger}) for target, ledger in zip(targets, ledgers, strict=True)]
        asking = [asyncio.ensure_future(read(gates[i % num_routers], max_tokens=TOKENS)) for i in range(STREAMS)]
        for task in asking:
            task.add_done_callback(lambda _: seen.release())
        for _ in asking:
            await seen.acquire()
        opened.set()
        found = await asyncio.gather(*asking)
        num_answered = sum(exc is None for _, exc, _ in found)
        assert all(exc is None or isinstance(exc, BudgetExceeded) for _, exc, _ in found)
        assert PAID - (num_routers - 1) <= num_answered <= PAID
        for ledger in ledgers:
            await ledger.stop()
        left = PAID - num_answered
        grant = await books.take("other", ALL, amount=PAID * TOKENS * MICRO, want=10**9, need=0)
        assert grant.spent == num_answered * TOKENS * MICRO
        assert left == 0 or grant.nanos > 0  # what no router needed was given back


def _read_all(pipe: Connection) -> list[tuple[str, int, float]]:
    found = []
    try:
        while True:
            found.append(pipe.recv())
    except EOFError:
        return found


@pytest.mark.slow  # two interpreters
def test_a_router_that_is_killed_loses_nothing_and_overspends_nothing(tmp_path: Path) -> None:
    """What it had settled and written is in the books, what it had set aside counts as spent, and the other router goes
    on with the rest, to the last lease.
    """
    budget = 10_000
    settings = prepared(tmp_path)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    routers = [context.Process(target=run_router, args=(str(tmp_path), budget, TOKENS, out)) for _, out in pipes]
    for router, (_, out) in zip(routers, pipes, strict=True):
        router.start()
        out.close()
    victim = routers[0]
    told: list[tuple[str, int, float]] = []
    while sum(what == "settled" for what, _, _ in told) < 150:
        told.append(pipes[0][0].recv())
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    told += _read_all(pipes[0][0])
    others = _read_all(pipes[1][0])
    for router in routers:
        router.join(60)
    assert others[-1][0] == "end"

    async def look() -> tuple[int, int, int]:
        store = open_store(settings, tmp_path)
        await store.start()
        (row,) = await store.read(lambda c: budgets.listed(c, round(time.time() * 1000) + 60_000, periods=("",)))
        (spent,) = await store.read(lambda c: spend.summed(c, "target", since=0, until=2**40))
        await store.stop()
        assert spent["cost_nanos"] == row["spent_nanos"]
        return tuple(row[name] // MICRO for name in ("spent_nanos", "held_nanos", "lost_nanos"))

    spent, held, lost = asyncio.run(look())
    survivor = sum(number for what, number, _ in others if what == "settled")
    settled = sum(number for what, number, _ in told if what == "settled")
    asked = sum(what == "asked" for what, _, _ in told)
    written = max(number for what, number, _ in told if what == "written")
    assert survivor > 0
    assert settled > 0
    assert spent >= survivor + written
    assert held == 0  # by any that lives
    assert spent + lost >= survivor + settled + (asked * 7 - settled)  # what it owed is covered
    assert spent + lost <= budget
    assert budget - (spent + lost) < TOKENS  # and nothing else of the budget is gone
