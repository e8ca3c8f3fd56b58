"""Money and limits of a gateway: a request is reserved for before its first attempt and settled when it is over.

gateway.py calls `reserve` and `settle`; who makes a Ledger starts and stops it. What was settled is in the books 0.1 s
later at most; between requests and books stand leases (accounts.py), so that a request waits for nobody.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from diptych.protos.errors import CapacityError, DiptychError
from diptych.protos.openai import ChatRequest
from diptych.protos.strict_json import printable

from .accounts import Account, Accounts, BudgetExceeded
from .billing import billed, paid_usage
from .books import MAX_KEY, MAX_ROUTE, MAX_TARGET, MAX_TENANT, Batch, Books, SpendKey, Tally
from .check import unpriced
from .limits import Allowance, Limits, Visit
from .matching import Facts, scopes
from .money_metrics import MoneyMetrics
from .money_settings import ANY, BudgetSettings, LimitSettings, MoneySettings, price_path
from .ports import Context, Standing
from .prices import Prices
from .rates import cost_at, dollars_of, nanos_of
from .record import AttemptRecord, ExchangeRecord
from .settings import GatewaySettings
from .shared_state import Demand
from .sizes import Size, size_of
from .target import Target

FLUSH_S: Final = 0.025  # what is settled within it is written together
BEAT_S: Final = 2.0  # a router that is silent is not counted
RETRY_S: Final = 0.5
MAX_RULES_KEPT: Final = 4096
_HOUR_S: Final = 3600
logger = logging.getLogger(__name__)


class Unpriced(DiptychError):
    """A budget holds for the request, and a target that may answer it has no price."""

    code = "unpriced"
    http_status = 503
    is_lasting = True


@dataclass(frozen=True, slots=True)
class _Rules:
    """That a request falls under: name, rule, scope."""

    budgets: tuple[tuple[str, BudgetSettings, str], ...]
    limits: tuple[tuple[str, LimitSettings, str], ...]


@dataclass(slots=True, kw_only=True)
class Reserved:
    """Of one request. `allowances` are for its answer's headers."""

    ledger: Ledger
    facts: Facts
    size: Size
    need: int  # nano-dollars that one attempt may cost
    held: list[tuple[Account, int]] = field(default_factory=list)
    visit: Visit

    @property
    def allowances(self) -> tuple[Allowance, ...]:
        """What is left of the limits that it falls under, of each kind the least."""
        return self.visit.allowances

    async def again(self, record: ExchangeRecord) -> None:
        """Another attempt is to be made: what those of `record` cost is set aside besides. Raises BudgetExceeded where
        it is not left, and CapacityError where the books cannot be asked.
        """
        await self.ledger.extend(self, record)

    async def settle(self, record: ExchangeRecord) -> None:
        """The request is over."""
        self.ledger.settle(self, record)


class Ledger:
    """For one event loop. `holder` names this router's life, another one after a restart. `now`: seconds since 1970."""

    def __init__(
        self,
        settings: MoneySettings,
        prices: Prices,
        books: Books,
        *,
        metrics: MoneyMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        holder: str = "",
    ) -> None:
        self.prices = prices
        self.holder = holder or f"router-{os.urandom(12).hex()}"
        self._settings = settings
        self._routes = settings.routes if isinstance(settings, GatewaySettings) else None
        self._books = books
        self._metrics = metrics
        self._now = now
        self._rules: dict[Facts, _Rules] = {}
        self._spend: dict[SpendKey, Tally] = {}
        self._news = asyncio.Event()
        self._accounts = Accounts(
            books,
            self.holder,
            metrics=metrics,
            changed=self._news.set,
            flush=self.flush,
            clock=clock,
            now=now,
        )
        self._limits = Limits(clock, self._count_limit)
        self._number = 0
        self._unsent: Batch | None = None
        self._is_cut_off = False
        self._task: asyncio.Task[None] | None = None
        self._flushing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Raises CapacityError where the books cannot be reached."""
        await asyncio.to_thread(self.prices.load)
        if isinstance(self._settings, GatewaySettings):
            for words in unpriced(self._settings, self.prices):
                logger.warning("%s", words)
        await self.flush()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="ledger")

    async def stop(self) -> None:
        """Behind the last request: everything is told, what was set aside and not used is given back. Raises
        CapacityError where the books cannot be reached; what was not used counts as spent then.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._accounts.give_back_all()
        await self.flush()
        await self.flush(is_last=True)

    async def reserve(self, request: ChatRequest, targets: Sequence[Target], context: Context) -> Reserved:
        """Raises LimitReached, BudgetExceeded (both RateLimited), Unpriced, and CapacityError where a lease is used up
        and the books cannot be reached. Takes nothing then.
        """
        facts = Facts(key=context.key, tenant=context.tenant, route=request.model, tags=context.tags)
        rules = self._rules_of(facts)
        size = size_of(request)
        wanted = self.prices.wanted_tokens(request)
        most = [(target.name, self.prices.most_nanos(target.name, size, wanted)) for target in targets]
        self._check_priced(rules, most)
        need = max((nanos for _, nanos in most if nanos is not None), default=0)
        visit = self._limits.admit(rules.limits, input_tokens=size.usual_tokens, output_tokens=wanted)
        reserved = Reserved(ledger=self, facts=facts, size=size, need=need, visit=visit)
        try:
            for name, budget, scope in rules.budgets:
                await self._hold(reserved, self._accounts.of(name, budget, scope), need)
        except BaseException:
            for account, held in reserved.held:
                self._accounts.release(account, held, 0)
            visit.withdraw()
            raise
        return reserved

    async def extend(self, reserved: Reserved, record: ExchangeRecord) -> None:
        """See Reserved.again."""
        owed = sum(self._owed(attempt, reserved) for attempt in record.attempts)
        need = owed + reserved.need
        for i, (account, held) in enumerate(reserved.held):
            if held < need and not account.budget.shadow:
                await self._accounts.hold(account, need - held)
                reserved.held[i] = account, need

    def standing(self, request: ChatRequest, targets: Sequence[Target], context: Context) -> tuple[Standing, ...]:
        """See ports.Ledger. Shadow budgets refuse nobody."""
        rules = self._rules_of(Facts(key=context.key, tenant=context.tenant, route=request.model, tags=context.tags))
        if not rules.budgets:
            return ()
        size, wanted = size_of(request), self.prices.wanted_tokens(request)
        most = [(target.name, self.prices.most_nanos(target.name, size, wanted)) for target in targets]
        need = max((nanos for _, nanos in most if nanos is not None), default=0)
        found = []
        for name, budget, scope in rules.budgets:
            left = self._accounts.left(name, budget, scope)
            refuses = ""
            if not budget.shadow:
                try:
                    self._check_priced(_Rules(((name, budget, scope),), ()), most)
                except Unpriced as exc:
                    refuses = exc.message
                if left is not None and left < need:
                    costs = f"${dollars_of(need):f}"
                    refuses = f"the budget {name} has ${dollars_of(left):f} left, and this may cost {costs}"
            part = None if left is None else left / nanos_of(budget.amount_usd)
            found.append(Standing(budget=name, scope=scope, left=part, refuses=refuses))
        return tuple(found)

    def demands(self) -> tuple[Demand, ...]:
        """See Limits."""
        return self._limits.demands()

    def lean(self, others: Mapping[tuple[str, str], float] | None, num_others: int) -> None:
        """See Limits."""
        self._limits.lean(others, num_others)

    def settle(self, reserved: Reserved, record: ExchangeRecord) -> None:
        """Book what the attempts cost, and free the rest."""
        facts = reserved.facts
        hour = int(self._now()) // _HOUR_S * _HOUR_S
        cost, input_tokens, output_tokens = 0, 0, 0
        found = billed(record, reserved.size, self.prices)
        is_known = record.outcome == "answered" or any(one.cost_nanos or one.input_tokens for _, one in found)
        for target, tally in found:
            cost += tally.cost_nanos
            input_tokens += tally.input_tokens
            output_tokens += tally.output_tokens
            where = self._row(hour, facts, target, is_known=is_known)
            self._spend.setdefault(where, Tally()).add(tally)
            if self._metrics is not None and tally.cost_nanos:
                self._metrics.spent.labels(target).inc(float(dollars_of(tally.cost_nanos)))
        reserved.visit.leave(input_tokens=input_tokens, output_tokens=output_tokens)
        for account, held in reserved.held:
            self._accounts.release(account, held, cost)
        self._news.set()

    async def flush(self, *, is_last: bool = False) -> None:
        """Tell the books everything there is to tell. Raises CapacityError; nothing is lost then."""
        async with self._flushing:
            while True:
                batch = self._unsent or self._batch(is_last=is_last)
                is_old = self._unsent is not None
                self._unsent = batch
                num_routers = await self._books.flush(batch)
                self._unsent = None
                self._limits.share(num_routers)
                if not is_old:
                    return

    def _batch(self, *, is_last: bool) -> Batch:
        self._number += 1
        spend, self._spend = self._spend, {}
        return Batch(
            holder=self.holder,
            number=self._number,
            now=self._now(),
            flows=self._accounts.flows(),
            spend=spend,
            is_last=is_last,
        )

    async def _run(self) -> None:
        """Flushes as there is news, and now and then, so that this router counts as one that lives."""
        loop = asyncio.get_running_loop()
        tidy_at = loop.time() + BEAT_S
        while True:
            try:
                async with asyncio.timeout_at(tidy_at):
                    await self._news.wait()
                await asyncio.sleep(FLUSH_S)
            except TimeoutError:
                pass
            if loop.time() >= tidy_at:
                self._accounts.give_back_idle()
                tidy_at = loop.time() + BEAT_S
            self._news.clear()
            try:
                await self._flush_timed()
            except Exception as exc:  # whatever it is: what was settled must be written once it can be
                if not self._is_cut_off:
                    logger.error(
                        "budgets and spend cannot be written now, and are kept here until they can: %s",
                        exc,
                        exc_info=not isinstance(exc, CapacityError),
                    )
                self._is_cut_off = True
                self._news.set()
                await asyncio.sleep(RETRY_S)

    async def _flush_timed(self) -> None:
        if self._metrics is None:
            await self.flush()
        else:
            with self._metrics.flush.time():
                await self.flush()
        if self._is_cut_off:
            logger.warning("budgets and spend are written again")
        self._is_cut_off = False

    async def _hold(self, reserved: Reserved, account: Account, need: int) -> None:
        try:
            await self._accounts.hold(account, need)
            reserved.held.append((account, need))
        except CapacityError as exc:
            budget = account.budget
            if isinstance(exc, BudgetExceeded) and self._metrics is not None:
                self._metrics.over_budget.labels(account.id.budget, _told(budget.shadow)).inc()
            if not budget.shadow:
                raise
            logger.info("shadow budget: %s", exc)
            reserved.held.append((account, 0))

    def _check_priced(self, rules: _Rules, most: Sequence[tuple[str, int | None]]) -> None:
        unknown = next((target for target, nanos in most if nanos is None), None)
        if unknown is None:
            return
        for name, budget, _ in rules.budgets:
            if budget.unpriced == "refuse" and not budget.shadow:
                raise Unpriced(
                    f"nobody knows what {unknown} costs, so the budget {name} cannot be kept: the server's operator "
                    f"has to give {price_path(unknown)}, or say gateway.budgets.{name}.unpriced: admit"
                )

    def _rules_of(self, facts: Facts) -> _Rules:
        found = self._rules.get(facts)
        if found is None:
            if len(self._rules) >= MAX_RULES_KEPT:
                self._rules.clear()
            settings = self._settings
            found = self._rules[facts] = _Rules(
                tuple((name, rule, one) for name, rule in settings.budgets.items() for one in scopes(rule, facts)),
                tuple((name, rule, one) for name, rule in settings.limits.items() for one in scopes(rule, facts)),
            )
        return found

    def _owed(self, attempt: AttemptRecord, reserved: Reserved) -> int:
        """What an attempt costs; one under way may cost all that was set aside for it."""
        if attempt.outcome == "running":
            return reserved.need
        paid, rates = paid_usage(attempt, reserved.size), self.prices.rates(attempt.target)
        cost = None if paid is None or rates is None else cost_at(rates, paid[0])
        return 0 if cost is None else cost.nanos

    def _row(self, hour: int, facts: Facts, target: str, *, is_known: bool) -> SpendKey:
        """Of a request's spend. A name that its client made up, and nobody answered to, gets no row of its own."""
        route = facts.route
        if not is_known and self._routes is not None and route not in self._routes:
            route = target = f"{route.partition('/')[0]}/{ANY}"
        return SpendKey(
            hour,
            _named(facts.tenant, MAX_TENANT),
            _named(facts.key, MAX_KEY),
            _named(route, MAX_ROUTE),
            _named(target, MAX_TARGET),
        )

    def _count_limit(self, name: str, is_shadow: bool) -> None:
        if self._metrics is not None:
            self._metrics.over_limit.labels(name, _told(is_shadow)).inc()
        if is_shadow:
            logger.info("shadow limit: a request is beyond %s", name)


def _named(name: str, most: int) -> str:
    """As every database can hold it."""
    if len(name) <= most and name.isprintable():
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{printable(name[: most - 20], most)}~{digest}"


def _told(flag: bool) -> str:
    return "true" if flag else "false"
