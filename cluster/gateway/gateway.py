"""The gateway as an object in a Python program: routes, own pools and providers behind one call.

The HTTP front holds one, and so may any program: nothing is served, started or looked up in the environment but keys.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.fetch import Fetcher
from diptych.cluster.providers.registry import Registry
from diptych.protos.errors import DeadlineExceeded, DiptychError, InvalidRequest, StartupError
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Event, Reply, ReplyBuilder

from .course import Breakers, Shared
from .exchange import Exchange
from .explanation import Explanation, explained
from .ledger import Ledger
from .money import money_ports
from .planning import Plan, Planner
from .ports import Context, Ports, Reservation
from .provider_target import ProviderTarget
from .record import ExchangeRecord, Watcher
from .relay import Relayed, RelayItem, Verbatim, as_events, aside, num_relayed
from .requests import Messages, of_one_choice, read_request
from .retries import RetryBudget
from .routes import Routes
from .settings import OWN, TARGET_NAME, GatewaySettings, OnUnsupported
from .signals import Continued, Restarted, StreamItem
from .spans import RequestSpans
from .state_sync import StateSync
from .strategies import strategies
from .target import Target

_NOBODY = Context()
MAX_MADE = 4096  # provider targets that are remembered


class Gateway:
    """For any number of requests at once, on one event loop. `targets` are own pools and other places, by their names;
    all else that routes name must be a provider's. Raises StartupError, with the key path, where there is none.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        providers: Registry | Clients | None = None,
        *,
        targets: Sequence[Target] = (),
        ports: Ports | None = None,
    ) -> None:
        self.settings = settings
        self.ports = ports = Ports() if ports is None else ports
        self._clients = Clients(providers) if isinstance(providers, Registry) else providers
        self._fetcher = Fetcher() if ports.fetcher is None else ports.fetcher
        self._targets = {target.name: target for target in targets}
        self._made: dict[tuple[str, OnUnsupported], Target] = {}
        self._ledger: Ledger | None = None  # of its own, to be started and stopped
        self._check_money()
        prices = ports.prices
        ways = strategies((lambda target, request: None) if prices is None else prices, ports.rng)
        try:
            routes = Routes(settings, self._place, ways, is_listed=self._is_listed)
        except ValueError as exc:
            raise StartupError(str(exc)) from exc
        self._routes = routes
        self._shared = Shared(
            routes=routes,
            breakers=Breakers(settings.breaker, ports.clock, routes.targets),
            retries=RetryBudget(fraction=settings.retry_fraction, floor=settings.retry_floor, clock=ports.clock),
            clock=ports.clock,
            rng=ports.rng,
        )
        self._planner = Planner(settings, routes, self._shared, strategies=ways, ports=ports)
        self._sync: StateSync | None = None
        if ports.shared is not None:
            limits = ports.ledger if isinstance(ports.ledger, Ledger) else None
            self._sync = StateSync(
                ports.shared, routes, self._shared.breakers, rng=ports.rng, limits=limits, metrics=ports.metrics
            )
        if ports.metrics is not None:
            ports.metrics.watch(self._breaker_states)

    @classmethod
    def from_config(
        cls,
        path: str | Path,
        *,
        targets: Sequence[Target] = (),
        ports: Ports | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Gateway:
        """By the branches `gateway:`, `providers:` and `fetch:` of a diptych.yaml; keys are read from `environ` when
        they are used. What `ports` leaves out of money and kept answers is made as the settings say: budgets and limits
        of this process alone. Raises StartupError with a sentence per mistake.
        """
        from diptych.cluster.config import load_config

        config = load_config(Path(path))
        registry = Registry.load(config.providers, os.environ if environ is None else environ)
        ports = Ports() if ports is None else ports
        if ports.fetcher is None:
            ports = replace(ports, fetcher=Fetcher(config.fetch))
        made = money_ports(config.gateway, ports=ports)
        gateway = cls(config.gateway, registry, targets=targets, ports=made)
        if made.ledger is not ports.ledger and isinstance(made.ledger, Ledger):
            gateway._ledger = made.ledger
        return gateway

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """What entering does: budgets are leased from now on, where the ledger is this gateway's own, and other routers
        told what happens here. Raises CapacityError where the books cannot be reached.
        """
        if self._ledger is not None:
            await self._ledger.start()
        if self._sync is not None:
            self._sync.start()

    async def aclose(self) -> None:
        """Closes the connections to providers, and tells other routers nothing more."""
        if self._sync is not None:
            await self._sync.stop()
        if self._ledger is not None:
            await self._ledger.stop()
        if self._clients is not None:
            await self._clients.close()

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all routes."""
        return self._routes.names

    def is_direct(self, name: str) -> bool:
        """Whether clients may name this PROVIDER/MODEL themselves."""
        return self.settings.direct and TARGET_NAME.fullmatch(name) is not None and self._is_listed(name)

    def targets_of(self, model: str) -> tuple[str, ...]:
        """The names of all targets that a name in `model` may lead to, a route's own first. Raises UnknownModel."""
        return tuple(target.name for target in self._routes.reachable(self._routes.of(model)))

    async def chat(
        self,
        model: str | ChatRequest,
        messages: Messages | None = None,
        *,
        context: Context = _NOBODY,
        **params: Any,
    ) -> Reply:
        """The answer to a conversation. `params` are the fields of POST /v1/chat/completions. Raises errors of
        protos/errors.py: InvalidRequest names the field, UnknownModel the routes that there are.
        """
        request = _of_one(read_request(model, messages, params), "choices")
        reply, _ = await self.answer(request, context)
        return reply

    async def choices(
        self,
        model: str | ChatRequest,
        messages: Messages | None = None,
        *,
        context: Context = _NOBODY,
        **params: Any,
    ) -> tuple[Reply, ...]:
        """`n` answers, each by attempts of its own and, where there is a seed, with a seed of its own. Raises as `chat`
        does, when one of them fails.
        """
        request = read_request(model, messages, params)
        if request.num_choices > 1:  # one answer several times is no choice
            context = replace(context, cache="no-store")
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.answer(of_one_choice(request, i), replace(context, choice=i)))
                    for i in range(request.num_choices)
                ]
        except BaseExceptionGroup as exc:
            raise exc.exceptions[0] from None
        return tuple(task.result()[0] for task in tasks)

    async def answer(
        self, request: ChatRequest, context: Context = _NOBODY, *, watcher: Watcher | None = None
    ) -> tuple[Reply, ExchangeRecord]:
        """A whole answer and what became of the request, which `watcher` sees too where the request fails. Raises as
        `chat` does.
        """
        plan = self._plan(request, context)
        with RequestSpans(self.ports.tracer, plan, is_stream=False) as spans:
            return await self._answered(plan, spans, watcher)

    async def _answered(self, plan: Plan, spans: RequestSpans, watcher: Watcher | None) -> tuple[Reply, ExchangeRecord]:
        request, context, cache = plan.request, plan.context, self.ports.cache
        is_kept = cache is not None and cache.takes(request, context)
        if cache is not None and is_kept and (found := await cache.find(request, context)) is not None:
            record = spans.record = plan.record
            record.outcome, record.cache = "cached", "hit"
            return found, record
        reservation = await self._reserved(plan)
        exchange = self._exchange(plan, reservation, watcher, spans)
        _note(exchange.record, reservation, is_kept=is_kept)
        try:
            reply = await exchange.whole()
        finally:
            await _settled(reservation, exchange.record)
        if cache is not None and is_kept:
            await cache.keep(request, context, reply)
        return reply, exchange.record

    def stream(
        self,
        model: str | ChatRequest,
        messages: Messages | None = None,
        *,
        context: Context = _NOBODY,
        restarts: bool = False,
        **params: Any,
    ) -> AnswerStream:
        """The same as events: `async with gateway.stream(...) as events: async for event in events`. With `restarts`
        an answer that breaks off begins again at another target, which the event Restarted tells: what came before it
        is void. Raises InvalidRequest and UnknownModel at once, other errors while it is read.
        """
        request = _of_one(read_request(model, messages, params), "streams")
        return AnswerStream(self, self._plan(request, context), restarts=restarts)

    def relay(self, request: ChatRequest, verbatim: Verbatim, *, context: Context = _NOBODY) -> RelayStream:
        """As `stream`, for a client of OpenAI's chat format: where the target's provider speaks it too, its chunks come
        as Relayed, to be written as they are; Usage and Ended follow them as events, which say nothing new. Else, and
        after a failure amid an answer, there are the events of `stream`: Began is told once and first in both cases, a
        role chunk was written if anything was Relayed.
        """
        return RelayStream(self, self._plan(_of_one(request, "streams"), context), verbatim=verbatim)

    def explain(
        self,
        model: str | ChatRequest,
        messages: Messages | None = None,
        *,
        context: Context = _NOBODY,
        **params: Any,
    ) -> Explanation:
        """Which rule would decide, which target be asked now, and why not the others; what it would cost. Nothing is
        sent or changed, and chance is left out.
        """
        request = read_request(model, messages, params)
        return explained(self._planner, self.ports, self.settings, request, context)

    def _plan(self, request: ChatRequest, context: Context) -> Plan:
        plan = self._planner.plan(request, context)
        if plan.rule and self.ports.metrics is not None:
            self.ports.metrics.decisions.labels(plan.rule).inc()
        return plan

    async def _reserved(self, plan: Plan) -> Reservation | None:
        ledger = self.ports.ledger
        if ledger is None:
            return None
        left_s = plan.deadline - self.ports.clock()
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                return await ledger.reserve(plan.request, plan.targets, plan.context)
        except TimeoutError:
            raise DeadlineExceeded("the budgets of this request could not be asked before its time was over") from None

    def _exchange(
        self,
        plan: Plan,
        reservation: Reservation | None,
        watcher: Watcher | None = None,
        spans: RequestSpans | None = None,
    ) -> Exchange:
        exchange = Exchange(plan, reservation=reservation, metrics=self.ports.metrics, watcher=watcher, spans=spans)
        if spans is not None:
            spans.record = exchange.record
        return exchange

    def _check_money(self) -> None:
        if (self.settings.budgets or self.settings.limits) and self.ports.ledger is None:
            key = "budgets" if self.settings.budgets else "limits"
            raise StartupError(
                f"gateway.{key}: this gateway was given no ledger to keep them; see cluster/gateway/money.py"
            )
        for name, route in self.settings.routes.items():
            if route.cache is not None and self.ports.cache is None:
                raise StartupError(f"gateway.routes.{name}.cache: this gateway was given no memory for answers")
            if route.strategy == "lowest_cost" and self.ports.prices is None:
                raise StartupError(
                    f"gateway.routes.{name}.strategy: lowest_cost needs prices, and this gateway was given none"
                )

    def _breaker_states(self) -> Mapping[str, str]:
        targets = self._routes.targets
        return {name: state for name, state in self._shared.breakers.states().items() if name in targets}

    def _is_listed(self, name: str) -> bool:
        return self._clients is not None and name.partition("/")[0] in self._clients.registry.configured

    def _place(self, name: str, on_unsupported: OnUnsupported) -> Target:
        if name in self._targets:
            return self._targets[name]
        made = self._made.get((name, on_unsupported))
        if made is None:
            made = self._provider_target(name, on_unsupported)
            if len(self._made) < MAX_MADE:  # names come from clients where `direct` lets them
                self._made[name, on_unsupported] = made
        return made

    def _provider_target(self, name: str, on_unsupported: OnUnsupported) -> Target:
        if name.startswith(f"{OWN}/"):
            known = ", ".join(sorted(self._targets)) or "none"
            raise ValueError(f"there is no own pool {name} here; there are: {known}")
        if self._clients is None:
            raise ValueError(f"there is no target {name}, and no providers are configured")
        try:
            provider, model = self._clients.registry.target(name)
        except InvalidRequest as exc:
            raise ValueError(exc.message) from exc
        return ProviderTarget(self._clients, provider, model, fetcher=self._fetcher, on_unsupported=on_unsupported)


class _Streamed:
    """One streamed answer, to be entered once. `record` tells what became of it so far; a `watcher` that is set before
    is called when attempts begin.
    """

    def __init__(
        self,
        gateway: Gateway,
        plan: Plan,
        *,
        restarts: bool = False,
        verbatim: Verbatim | None = None,
    ) -> None:
        self.record = plan.record
        self.watcher: Watcher | None = None
        self._gateway = gateway
        self._plan = plan
        self._restarts = restarts
        self._verbatim = verbatim
        self._seen: list[Event | Relayed] = []
        self._items: AsyncGenerator[RelayItem, None] | None = None
        self._spans: RequestSpans | None = None

    async def __aenter__(self) -> Self:
        self._spans = RequestSpans(self._gateway.ports.tracer, self._plan, is_stream=True)
        self._spans.record = self.record
        self._items = self._told(self._spans)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._items is not None
        assert self._spans is not None
        with self._spans:
            await self._items.aclose()

    def reply(self) -> Reply:
        """The whole of what was told, or what there is of it so far."""
        builder = ReplyBuilder()
        for event in as_events(self._seen):
            builder.add(event)
        return builder.reply()

    async def _told(self, spans: RequestSpans) -> AsyncGenerator[RelayItem, None]:
        ports, request, context = self._gateway.ports, self._plan.request, self._plan.context
        is_kept = ports.cache is not None and ports.cache.takes(request, context)
        if ports.cache is not None and is_kept and (found := await ports.cache.find(request, context)) is not None:
            self.record.outcome, self.record.cache = "cached", "hit"
            for event in found.events():
                self._seen.append(event)
                yield event
            return
        try:
            reservation = await self._gateway._reserved(self._plan)
        except DiptychError as exc:
            self.record.outcome = exc.code
            raise
        exchange = self._gateway._exchange(self._plan, reservation, self.watcher, spans)
        self.record = exchange.record
        _note(self.record, reservation, is_kept=is_kept)
        items = exchange.stream(restarts=self._restarts, verbatim=self._verbatim)
        try:
            async for item in items:
                if isinstance(item, Restarted):
                    self._seen.clear()
                elif not isinstance(item, Continued):
                    self._seen.append(item)
                yield item
        finally:
            await items.aclose()
            await _settled(reservation, exchange.record)
        if ports.cache is not None and is_kept:
            await ports.cache.keep(request, context, await aside(self.reply, num_relayed(self._seen)))


class AnswerStream(_Streamed):
    """Events, and the signals between them."""

    def __aiter__(self) -> AsyncGenerator[StreamItem, None]:
        assert self._items is not None, "enter the stream first: async with gateway.stream(...) as events"
        return cast("AsyncGenerator[StreamItem, None]", self._items)  # nobody passes bytes on unasked


class RelayStream(_Streamed):
    """The same, with the provider's own bytes where they can be had."""

    def __aiter__(self) -> AsyncGenerator[RelayItem, None]:
        assert self._items is not None, "enter the stream first: async with gateway.relay(...) as items"
        return self._items


def _note(record: ExchangeRecord, reservation: Reservation | None, *, is_kept: bool) -> None:
    record.cache = "miss" if is_kept else ""
    record.allowances = () if reservation is None else reservation.allowances


async def _settled(reservation: Reservation | None, record: ExchangeRecord) -> None:
    """Also where the request's task is being cancelled: what was set aside would be lost otherwise."""
    if reservation is not None:
        await asyncio.shield(asyncio.ensure_future(reservation.settle(record)))


def _of_one(request: ChatRequest, others: str) -> ChatRequest:
    if request.num_choices > 1:
        told = "call `choices` for several answers" if others == "choices" else "open one stream for each answer"
        raise InvalidRequest(f"n: {told}", "n")
    return request
