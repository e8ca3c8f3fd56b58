"""Money is set aside before and booked after: whatever becomes of a request, what it did not cost is free again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from journeys import HELLO, gateway, read, run
from prometheus_client import CollectorRegistry, generate_latest
from tills import MICRO, PRICES, TARGET, answered, asked, attempt_of, budget_of, ledger_of, reserve, settings_of

from diptych.cluster.gateway.accounts import IN_WORK_RETRY_S, BudgetExceeded
from diptych.cluster.gateway.books import AccountId, Batch, Grant, MemoryBooks, SpendKey
from diptych.cluster.gateway.ledger import Ledger, Unpriced
from diptych.cluster.gateway.matching import FOREVER_S, Facts, is_of_tenant, scopes
from diptych.cluster.gateway.money_metrics import MoneyMetrics
from diptych.cluster.gateway.money_settings import BudgetSettings
from diptych.cluster.gateway.ports import Context
from diptych.cluster.gateway.record import ExchangeRecord
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import Script, ScriptedTarget, Wait, fails, says
from diptych.protos.deltas import Content
from diptych.protos.errors import CapacityError, DiptychError, Overloaded
from diptych.protos.failures import Failure, FailureKind
from diptych.protos.replies import Began, Usage

ALL = AccountId("all", "", "")


def till(micros: float = 100, books: Any = None, metrics: Any = None, **budget: Any) -> Ledger:
    budget = {"period": "total", "lease_usd": 10e-6, **budget}
    return ledger_of(settings_of(budgets=budget_of(micros, **budget)), books, metrics=metrics)


def nothing() -> ExchangeRecord:
    return ExchangeRecord(model="chat", outcome="overloaded")


class SlowBooks(MemoryBooks):
    """Grants when `go` is set; `broken`: they fail, before or after they have done it."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.go.set()
        self.broken = ""

    async def take(self, holder: str, account: AccountId, *, amount: int, want: int, need: int) -> Grant:
        await self.go.wait()
        if self.broken:
            raise Overloaded("no", 1.0)
        return await super().take(holder, account, amount=amount, want=want, need=need)

    async def flush(self, batch: Batch) -> int:
        if self.broken == "before":
            raise Overloaded("no", 1.0)
        found = await super().flush(batch)
        if self.broken == "after":
            raise Overloaded("no", 1.0)
        return found


async def test_what_is_left_over_of_a_reservation_is_free_again() -> None:
    """Reserving 10 and using 4 must leave 96 of 100, now and in the books."""
    books = MemoryBooks()
    ledger = till(books=books)
    for used, left in ((4, 96), (0, 96), (10, 86)):
        reserved = await reserve(ledger, 10)
        await reserved.settle(answered(used))
        await ledger.flush()
        assert books.accounts[ALL].spent == (100 - left) * MICRO
    await ledger.stop()
    assert books.accounts[ALL].committed == 14 * MICRO
    hour = next(iter(books.spend)).hour
    assert books.spend[SpendKey(hour, "", "", "chat", "p/a")].requests == 3


@pytest.mark.parametrize("is_remembered", [False, True])
async def test_nobody_is_refused_for_what_this_router_gave_back(is_remembered: bool) -> None:
    """What is given back is the books' with the next flush; until then a request for all that is left was told that
    it is set aside for requests in work, when there are none.
    """
    ledger = till(200, lease_usd=50e-6)
    reserved = await reserve(ledger, 40)
    await asyncio.gather(*ledger._accounts._tasks)  # the lease is renewed, and larger than it need be
    if is_remembered:
        with pytest.raises(BudgetExceeded):
            await reserve(ledger, 170)
    await reserved.settle(answered(0))
    await (await reserve(ledger, 170)).settle(answered(170))
    await ledger.stop()


async def test_what_is_left_stays_known_while_nobody_asks() -> None:
    """A rule by budget_left held for no request that came more than ten seconds behind the one before."""
    now = [0.0]
    ledger = ledger_of(settings_of(budgets=budget_of(100, lease_usd=10e-6)), clock=lambda: now[0])
    await (await reserve(ledger, 95)).settle(answered(95))
    for at in (60.0, 120.0):
        await asyncio.gather(*ledger._accounts._tasks)
        now[0] = at
        ledger._accounts.give_back_idle()
        await ledger.flush()
    (standing,) = ledger.standing(asked(), [TARGET], Context())
    assert standing.left == pytest.approx(0.05)


async def test_a_refusal_says_what_is_left_and_when_to_come_again() -> None:
    """Money in work may come back soon; money that is spent does not."""
    ledger = till(15)
    first = await reserve(ledger, 10)
    with pytest.raises(BudgetExceeded, match=r"may cost \$0\.00001, and what is left .* is set aside") as told:
        await reserve(ledger, 10)
    assert told.value.retry_after_s == IN_WORK_RETRY_S
    await first.settle(answered(10))
    await ledger.flush()
    with pytest.raises(BudgetExceeded, match=r"\$0\.000005 of \$0\.000015 are left of the budget all; ask for") as told:
        await ledger.reserve(asked(11), [TARGET], Context())
    assert (told.value.code, told.value.http_status, told.value.retry_after_s) == ("insufficient_quota", 429, FOREVER_S)
    await (await reserve(ledger, 5)).settle(nothing())


async def test_a_refused_request_takes_nothing() -> None:
    """Of a wide budget, of a limit: a client that retries would use them up for the others."""
    budgets = {"wide": {"amount_usd": 1, "period": "total"}, "narrow": {"amount_usd": 5e-6, "period": "total"}}
    limits = {"some": {"requests_per_minute": 2, "output_tokens_per_minute": 1000, "concurrency": 1}}
    books = MemoryBooks()
    ledger = ledger_of(settings_of(budgets=budgets, limits=limits), books)
    for _ in range(5):
        with pytest.raises(BudgetExceeded, match="narrow"):
            await reserve(ledger, 10)
    reserved = await reserve(ledger, 5)
    assert [(one.kind, one.remaining) for one in reserved.allowances] == [("requests", 1), ("output-tokens", 995)]
    await reserved.settle(nothing())
    await ledger.stop()
    assert [kept.committed for kept in books.accounts.values()] == [0, 0]


async def test_who_is_cancelled_while_waiting_for_a_lease_holds_nothing() -> None:
    """And takes nobody else's lease away."""
    books = SlowBooks()
    ledger = till(20, books)
    books.go.clear()
    waiting = [asyncio.ensure_future(reserve(ledger, 10)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    books.go.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    for reserved in found[1:]:
        await reserved.settle(answered(10))  # type: ignore[union-attr]
    await ledger.stop()
    assert books.accounts[ALL].committed == 20 * MICRO


async def test_books_that_fail_lose_and_double_nothing() -> None:
    """A flush may fail after it was done; it is sent again under its number."""
    books = SlowBooks()
    ledger = till(100, books)
    for broken in ("before", "after", ""):
        await (await reserve(ledger, 2)).settle(answered(2))
        books.broken = broken
        if broken:
            with pytest.raises(CapacityError):
                await ledger.flush()
        books.broken = ""
    books.broken = "before"
    with pytest.raises(CapacityError):  # more than the lease has
        await reserve(ledger, 50)
    books.broken = ""
    await ledger.flush()
    assert books.accounts[ALL].spent == 6 * MICRO
    await ledger.stop()
    assert books.accounts[ALL].committed == 6 * MICRO


async def test_the_ledger_writes_by_itself_and_goes_on_behind_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the books raise once, later flushes must come: budgets of all routers hang on them."""
    monkeypatch.setattr("diptych.cluster.gateway.ledger.FLUSH_S", 0.0)
    monkeypatch.setattr("diptych.cluster.gateway.ledger.RETRY_S", 0.0)
    written = asyncio.Event()

    class Books(MemoryBooks):
        failures = 2

        async def flush(self, batch: Batch) -> int:
            if batch.spend and self.failures:
                self.failures -= 1
                raise ValueError("a defect")
            found = await super().flush(batch)
            if batch.spend:
                written.set()
            return found

    books = Books()
    async with till(books=books) as ledger:
        await (await reserve(ledger, 2)).settle(answered(2))
        await asyncio.wait_for(written.wait(), 30)
    assert books.accounts[ALL].committed == 2 * MICRO


async def test_all_attempts_are_paid_for_and_failures_that_computed_nothing_are_not() -> None:
    """A hedge that lost, a stream that broke: owed. A 429: not."""
    lost = attempt_of(usage=Usage(input_tokens=7), outcome="lost", output_chars=40)
    refused = attempt_of(
        outcome="failed", failure=Failure(kind=FailureKind.RATE_LIMITED, message="later", status=429), target="p/b"
    )
    broke = attempt_of(
        outcome="failed", phase="C", failure=Failure(kind=FailureKind.IDLE_TIMEOUT, message="-"), output_chars=20
    )
    record = answered(3)
    record.attempts = [lost, refused, broke, *record.attempts]
    books = MemoryBooks()
    ledger = till(books=books)
    await (await reserve(ledger, 20)).settle(record)
    await ledger.stop()
    assert books.accounts[ALL].committed == (10 + 5 + 3) * MICRO
    (tally,) = [tally for where, tally in books.spend.items() if where.target == "p/a"]
    assert (tally.requests, tally.output_tokens, tally.estimated) == (1, 18, 2)


async def test_a_price_that_nobody_knows_is_refused_or_counted() -> None:
    """Never nothing: a budget over it would not be one."""
    targets = [TARGET, ScriptedTarget("p/unknown")]
    with pytest.raises(Unpriced, match=r"gateway\.prices\.p/unknown, or say gateway\.budgets\.all\.unpriced: admit"):
        await till().reserve(asked(), targets, Context())
    with pytest.raises(Unpriced, match=r"gateway\.pools\.tiny\.per_device_hour"):
        await till().reserve(asked(), [ScriptedTarget("pool/tiny")], Context())
    books = MemoryBooks()
    ledger = till(books=books, unpriced="admit")
    reserved = await ledger.reserve(asked(), targets, Context())
    await reserved.settle(answered(5, target="p/unknown"))
    await ledger.stop()
    (tally,) = books.spend.values()
    assert (tally.cost_nanos, tally.unpriced, tally.output_tokens) == (0, 1, 5)


async def test_of_a_cost_that_is_known_in_part_that_part_is_booked_and_the_record_says_so() -> None:
    """Booked as if it were all, it would be a price that nobody gave; booked as nothing, a budget would run on."""
    books = MemoryBooks()
    ledger = till(books=books)
    record = answered(5)
    record.attempts[-1].usage = replace(record.attempts[-1].usage, web_searches=2)
    await (await reserve(ledger, 20)).settle(record)
    await ledger.stop()
    (tally,) = books.spend.values()
    assert (tally.cost_nanos, tally.unpriced) == (5 * MICRO, 1)
    assert record.words == ["p/a cost $0.000005 or more: nobody knows a price for web searches"]


async def test_a_shadow_lets_through_counts_and_books() -> None:
    """What a budget would have refused is known before it does."""
    registry, books = CollectorRegistry(), MemoryBooks()
    ledger = till(15, books, MoneyMetrics(registry), shadow=True)
    for _ in range(3):
        await (await reserve(ledger, 10)).settle(answered(10))
        await ledger.flush()
    await ledger.stop()
    assert books.accounts[ALL].spent == 30 * MICRO
    assert 'over_budget_total{budget="all",shadow="true"} 2.0' in generate_latest(registry).decode()


async def test_a_busy_router_gives_back_what_it_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other accounts and of yesterday's, while requests come without a pause."""
    monkeypatch.setattr("diptych.cluster.gateway.ledger.FLUSH_S", 0.0)
    monkeypatch.setattr("diptych.cluster.gateway.ledger.BEAT_S", 0.0)
    monkeypatch.setattr("diptych.cluster.gateway.accounts.IDLE_S", -1.0)
    books = MemoryBooks()
    ledger = ledger_of(settings_of(budgets=budget_of(10**6, period="total", tenant="*", lease_usd=10e-6)), books)
    await ledger.start()
    await (await reserve(ledger, 1, tenant="a")).settle(answered(1))
    account = AccountId("all", "tenant=a", "")
    async with asyncio.timeout(30):
        while books.accounts[account].committed != MICRO:
            await (await reserve(ledger, 1, tenant="b")).settle(answered(1))
            await asyncio.sleep(0)
    await ledger.stop()


async def test_a_request_over_midnight_is_of_the_day_it_began() -> None:
    """Its reservation is there; the new day's account is whole."""
    now = [86_400.0 * 20_000 - 1]
    books = MemoryBooks()
    ledger = ledger_of(settings_of(budgets=budget_of(20, period="day")), books, now=lambda: now[0])
    reserved = await reserve(ledger, 20)
    with pytest.raises(BudgetExceeded, match="for today"):
        await reserve(ledger, 20)
    now[0] += 2
    other = await reserve(ledger, 20)
    await reserved.settle(answered(20))
    await other.settle(answered(3))
    await ledger.stop()
    told = {account.period: kept.committed // MICRO for account, kept in books.accounts.items()}
    assert told == {"2024-10-03": 20, "2024-10-04": 3}


async def test_names_that_clients_make_up_fill_no_table_and_break_no_database() -> None:
    """`direct` lets them name any model of a provider, in any writing; PostgreSQL has no room for NUL."""
    settings = GatewaySettings.model_validate({"prices": PRICES, "direct": True})
    books = MemoryBooks()
    ledger = ledger_of(settings, books)
    for name in ("p/made-up", "p/other", "p/\x00", "p/\ud800" + "x" * 400):
        request = asked().model_copy(update={"model": name})
        reserved = await ledger.reserve(request, [TARGET], Context(tenant="t\x00"))
        record = nothing()
        record.attempts = [
            attempt_of(name, outcome="failed", failure=Failure(kind=FailureKind.NOT_FOUND, message="-", status=404))
        ]
        await reserved.settle(record)
    await ledger.flush()
    ((where, tally),) = books.spend.items()
    assert (where.route, where.target, tally.requests) == ("p/*", "p/*", 4)
    assert where.tenant.isprintable()
    reserved = await ledger.reserve(asked().model_copy(update={"model": "p/\ud800"}), [TARGET], Context())
    await reserved.settle(answered(1))
    await ledger.flush()
    assert all(where.route.encode() and len(where.route) <= 256 for where in books.spend)


def test_accounts_cannot_be_taken_for_each_other() -> None:
    """A tag with spaces and signs must not name another tenant's account."""
    rule = BudgetSettings(amount_usd=1, tenant="*", tag="*")
    facts = Facts(key="k", tenant="a b", route="chat", tags=("x tenant=c", "\ud800"))
    assert scopes(rule, facts) == ("tenant=a%20b tag=x%20tenant=c", "tenant=a%20b tag=%ED%A0%80")
    assert is_of_tenant(rule, "tenant=a%20b tag=x", "a b")
    assert not is_of_tenant(rule, "tenant=a%20b tag=x%20tenant=c", "c")
    both = BudgetSettings(amount_usd=1, key="*", tenant="*")
    assert is_of_tenant(both, scopes(both, facts)[0], "a b")
    assert is_of_tenant(BudgetSettings(amount_usd=1, tenant="c", key="*"), "key=k", "c")
    assert not is_of_tenant(BudgetSettings(amount_usd=1), "", "")
    assert scopes(BudgetSettings(amount_usd=1, tenant="other"), facts) == ()


def test_a_further_attempt_is_made_only_where_there_is_money_for_it() -> None:
    """What the broken attempt cost comes on top: budgets would be overspent by every failure of a provider."""

    async def job(micros: float) -> tuple[int, int, str]:
        broken: Script = [Began("a", "m"), Content("x" * 400), Usage(output_tokens=90), fails(FailureKind.SERVER)]
        target = ScriptedTarget("p/a", [broken, says("fine", tokens=10)])
        books = MemoryBooks()
        ledger = till(micros, books)
        gate = gateway(target, ports={"ledger": ledger})
        _, exc, record = await read(gate, max_tokens=100, restarts=True)
        await ledger.stop()
        assert (exc is None) == (micros >= 200)
        return len(target.requests), books.accounts[ALL].committed // MICRO, " ".join(record.words)

    assert run(job(200)) == (2, 110, "")
    requests, spent, words = run(job(150))
    assert (requests, spent) == (1, 100)
    assert words.startswith("p/a was not tried: this request may cost $0.0001, and")


def test_a_dearer_fallback_is_set_aside_for() -> None:
    """Requests that were reserved for at the cheap target and answered at the dear one would overspend tenfold."""

    async def job() -> int:
        cheap = ScriptedTarget("p/a", [[fails(FailureKind.SERVER)]])
        dear = ScriptedTarget("p/dear", [says("x", tokens=10)])
        prices = {**PRICES, "p/dear": {"input_per_mtok": 0, "output_per_mtok": 10}}
        settings = settings_of(budgets=budget_of(250, period="total")).model_copy(
            update={"prices": settings_of(prices=prices).prices}
        )
        ledger = ledger_of(settings)
        gate = gateway(
            cheap,
            dear,
            routes={"other": {"targets": ["p/dear"]}},
            fallback=["other"],
            retries=0,
            ports={"ledger": ledger},
        )
        found = await asyncio.gather(*(read(gate, max_tokens=10) for _ in range(5)))
        await ledger.stop()
        return sum(exc is None for _, exc, _ in found)

    assert run(job()) == 2


@pytest.mark.parametrize("how", ["cancelled", "left", "no target"])
def test_whatever_becomes_of_a_stream_its_reservation_ends(how: str) -> None:
    """A reservation that nobody settles is money that nobody can use."""

    async def job() -> tuple[int, int]:
        script: Script = (
            [fails(FailureKind.CONNECT)] if how == "no target" else [Began("a", "m"), Content("x" * 16), Wait(1e6)]
        )
        target = ScriptedTarget("p/a", [script])
        books = MemoryBooks()
        ledger = till(100, books)
        gate = gateway(target, ports={"ledger": ledger})

        async def ask() -> None:
            async with gate.stream("chat", HELLO, max_tokens=50) as events:
                async for event in events:
                    if how == "left" and isinstance(event, Content):
                        break

        asking = asyncio.ensure_future(ask())
        await asyncio.sleep(1.0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await ledger.stop()
        return books.accounts[ALL].spent // MICRO, books.accounts[ALL].committed // MICRO

    assert run(job()) == ((0, 0) if how == "no target" else (4, 4))


class LateBooks(MemoryBooks):
    """From `late` on, each grant takes ten seconds."""

    late = False

    async def take(self, holder: str, account: AccountId, *, amount: int, want: int, need: int) -> Grant:
        if self.late:
            await asyncio.sleep(10)
        return await super().take(holder, account, amount=amount, want=want, need=need)


def lately(first: Script, is_leased: bool = True, **wanted: Any) -> tuple[str, float, int]:
    """What is said, when, and what is set aside then, where the lease is enough for one attempt alone and the books
    are slow.
    """

    async def job() -> tuple[str, float, int]:
        loop, books = asyncio.get_running_loop(), LateBooks()
        prices = {name: {"input_per_mtok": 1, "output_per_mtok": 1} for name in ("p/a", "p/b")}
        settings = settings_of(prices=prices, budgets=budget_of(1000, period="total", lease_usd=25e-6))
        ledger = ledger_of(settings, books, clock=loop.time)
        targets = ScriptedTarget("p/a", [first]), ScriptedTarget("p/b", [says("other")])
        gate = gateway(*targets, ports={"ledger": ledger}, hedge={"after": 0.5, "max_fraction": 0.5})
        if is_leased:
            for _ in range(3):  # half a hedge is saved by each, and the second one uses it
                await gate.chat("chat", HELLO, max_tokens=1, timeout_s=1)
            await asyncio.gather(*ledger._accounts._tasks)
        books.late, began = True, loop.time()
        try:
            said = (await gate.chat("chat", HELLO, max_tokens=10, **wanted)).message.content
        except DiptychError as exc:
            said = exc.code
        took, (account,) = loop.time() - began, ledger._accounts._accounts.values()
        await asyncio.gather(*ledger._accounts._tasks)
        return said, took, account.reserved

    return run(job())


def test_slow_books_keep_no_answer_back_and_no_request_beyond_its_deadline() -> None:
    """A hedge waited for money while the answer lay there; without a lease requests waited as long as the store did."""
    assert lately([Wait(0.9), *says("first")]) == ("first", pytest.approx(0.9), 0)
    assert lately([Wait(0.7), fails(FailureKind.OVERLOADED)]) == ("other", pytest.approx(0.7), 0)
    assert lately([Wait(60)], timeout_s=2) == ("first_token_timeout", pytest.approx(2), 0)
    assert lately(says("first"), is_leased=False, timeout_s=2) == ("deadline_exceeded", pytest.approx(2), 0)
