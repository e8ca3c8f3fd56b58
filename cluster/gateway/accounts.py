"""A router's part of each budget: a lease, out of which requests are reserved without asking anybody else.

ledger.py reserves and settles with it. A lease is made larger before it is used up, and what lies idle is given back.
Nobody spends what was not leased before, so that all routers together keep a budget; what a request costs beyond its
reservation is booked all the same, and counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Final

from diptych.protos.errors import RateLimited

from .books import AccountId, Books, Flow
from .matching import ends_in_s, period_of, present_periods
from .money_metrics import MoneyMetrics
from .money_settings import BudgetSettings
from .rates import dollars_of, nanos_of

IDLE_S: Final = 10.0  # a lease that nobody used for so long is given back
REFUSED_S: Final = 0.25  # as long nobody asks again for what was refused
IN_WORK_RETRY_S: Final = 5.0  # what is set aside may be settled for less by then
MAX_ACCOUNTS: Final = 65_536
_LEASE_PART: Final = 100


class BudgetExceeded(RateLimited):
    """What a request may cost is not left in a budget."""

    code = "insufficient_quota"


class Account:
    """One, at this router. Nano-dollars: `leased` are ours, of them `reserved` are for requests in work."""

    __slots__ = (
        "budget",
        "flow",
        "gave_back",
        "id",
        "leased",
        "refused",
        "reserved",
        "spent",
        "topping",
        "used_at",
        "wanted",
    )

    def __init__(self, account: AccountId, budget: BudgetSettings) -> None:
        self.id = account
        self.budget = budget
        self.leased = 0
        self.reserved = 0
        self.wanted = 0  # by requests that wait for a larger lease
        self.flow = Flow()  # what the books do not know yet
        self.gave_back = False  # a part of the lease, which the books may not know yet
        self.spent = 0  # by everybody, as far as is known here
        self.refused: tuple[float, int] = (0.0, 0)  # until when, how much
        self.topping: asyncio.Task[None] | None = None
        self.used_at = 0.0

    @property
    def free(self) -> int:
        """What a request may have at once."""
        return self.leased - self.reserved

    @property
    def lease(self) -> int:
        """What is fetched at once."""
        if self.budget.lease_usd is not None:
            return nanos_of(self.budget.lease_usd)
        return max(self.amount // _LEASE_PART, 1)

    @property
    def amount(self) -> int:
        """Of the budget."""
        return nanos_of(self.budget.amount_usd)

    @property
    def is_idle(self) -> bool:
        """Whether nothing hangs on it here."""
        return not (self.leased or self.reserved or self.wanted or self.flow.spent or self.flow.leased)

    def give_back(self, nanos: int) -> None:
        """So much of the lease."""
        self.leased -= nanos
        self.flow.leased -= nanos
        self.gave_back = True
        self.refused = (0.0, 0)  # there is more than there was then


class Accounts:
    """Of one router, for one event loop. `holder` names it in the books; `changed` is called when there is something
    to flush, `flush` where it cannot wait.
    """

    def __init__(
        self,
        books: Books,
        holder: str,
        *,
        metrics: MoneyMetrics | None,
        changed: Callable[[], None],
        flush: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._books = books
        self._holder = holder
        self._metrics = metrics
        self._changed = changed
        self._flush = flush
        self._clock = clock
        self._now = now
        self._accounts: dict[AccountId, Account] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, name: str, budget: BudgetSettings, scope: str) -> Account:
        """The account of the present period."""
        found = AccountId(name, scope, period_of(budget.period, self._now()))
        account = self._accounts.get(found)
        if account is None:
            if len(self._accounts) >= MAX_ACCOUNTS:
                self._forget(())
            account = self._accounts[found] = Account(found, budget)
        return account

    def left(self, name: str, budget: BudgetSettings, scope: str) -> int | None:
        """Nano-dollars of the budget that are not spent, as far as is known here; None before anything was leased."""
        account = self._accounts.get(AccountId(name, scope, period_of(budget.period, self._now())))
        if account is None or not (account.leased or account.spent or account.refused[0]):
            return None
        return max(account.amount - account.spent, 0)

    async def hold(self, account: Account, nanos: int) -> None:
        """Set aside. Raises BudgetExceeded, and CapacityError where the books cannot be asked."""
        if account.free < nanos:
            await self._wait_for(account, nanos)
        account.reserved += nanos
        account.used_at = self._clock()
        if account.free < account.lease // 2 and account.topping is None and not self._is_refused(account, 1):
            self._top_up(account, 1)

    def release(self, account: Account, held: int, cost: int) -> None:
        """Of `held` that were set aside, `cost` were spent; it may be more. What is left beyond a lease goes back."""
        account.reserved -= held
        covered = min(cost, max(account.free, 0))
        account.leased -= covered
        surplus = account.free - account.lease
        given = surplus if surplus > 0 and not account.wanted else 0
        account.flow.spent += cost
        account.spent += cost
        account.flow.leased -= covered
        if given:
            account.give_back(given)
        account.used_at = self._clock()
        if cost > covered and self._metrics is not None:
            self._metrics.overspent.labels(account.id.budget).inc(float(dollars_of(cost - covered)))
        if cost or given:
            self._changed()

    def give_back_idle(self) -> None:
        """Leases that nobody uses; accounts of periods that are over are forgotten, of others what is left is known."""
        self._give_back(self._clock() - IDLE_S)
        self._forget(tuple(present_periods(self._now())))

    async def give_back_all(self) -> None:
        """At the end of the router: whatever is not reserved."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._give_back(float("inf"))

    def flows(self) -> dict[AccountId, Flow]:
        """What the books do not know yet; whoever asks tells them."""
        found = {}
        for account in self._accounts.values():
            if account.flow.spent or account.flow.leased:
                found[account.id], account.flow = account.flow, Flow()
        return found

    def _give_back(self, used_before: float) -> None:
        for account in self._accounts.values():
            if account.free > 0 and account.used_at < used_before and not account.wanted and account.topping is None:
                account.give_back(account.free)
                self._changed()

    def _forget(self, but: Collection[str]) -> None:
        idle = [found for found, account in self._accounts.items() if account.is_idle and not account.topping]
        for found in idle:
            if found.period not in but:
                del self._accounts[found]

    async def _wait_for(self, account: Account, nanos: int) -> None:
        account.wanted += nanos
        try:
            while account.free < nanos:
                if self._is_refused(account, nanos):
                    raise self._exceeded(account, nanos)
                task = account.topping or self._top_up(account, nanos - account.free)
                # Whoever is cancelled leaves the others' lease alone, and what was granted is not lost.
                await asyncio.shield(task)
        finally:
            account.wanted -= nanos

    def _top_up(self, account: Account, need: int) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._fetch(account, need), name="lease")
        account.topping = task
        self._tasks.add(task)
        task.add_done_callback(self._fetched)
        return task

    def _fetched(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it too; of a renewal nobody waits, and the next request asks again

    async def _fetch(self, account: Account, need: int) -> None:
        outcome = "failed"
        try:
            want = max(account.lease, account.wanted - account.free, need)
            take = partial(self._books.take, self._holder, account.id, amount=account.amount, want=want, need=need)
            grant = await take()
            if not grant.nanos and account.gave_back:  # nobody is refused for what this router holds itself
                account.gave_back = False
                await self._flush()
                grant = await take()
            account.spent = max(account.spent, grant.spent + account.flow.spent)
            account.leased += grant.nanos
            account.refused = (0.0, 0) if grant.nanos else (self._clock() + REFUSED_S, need)
            outcome = "granted" if grant.nanos else "refused"
        finally:
            account.topping = None
            if self._metrics is not None:
                self._metrics.leases.labels(outcome).inc()

    def _is_refused(self, account: Account, nanos: int) -> bool:
        until, need = account.refused
        return nanos - account.free >= need and self._clock() < until

    def _exceeded(self, account: Account, nanos: int) -> BudgetExceeded:
        left = max(account.amount - account.spent, 0)
        whose = f" of {account.id.scope}" if account.id.scope else ""
        period = {"total": "", "day": " for today", "month": " for this month"}[account.budget.period]
        named = f"the budget {account.id.budget}{whose}{period}"
        costs = f"this request may cost {_dollars(nanos)}"
        if left >= nanos:
            return BudgetExceeded(
                f"{costs}, and what is left of {named} is set aside for requests in work; ask for fewer tokens "
                "(max_completion_tokens), or try again when they are over",
                IN_WORK_RETRY_S,
            )
        return BudgetExceeded(
            f"{costs}, and {_dollars(left)} of {_dollars(account.amount)} are left of {named}; ask for fewer tokens "
            "(max_completion_tokens), or ask the operator for more",
            ends_in_s(account.budget.period, self._now()),
        )


def _dollars(nanos: int) -> str:
    return f"${dollars_of(nanos):.6f}".rstrip("0").rstrip(".")
