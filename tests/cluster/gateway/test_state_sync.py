"""What gateways of several routers tell each other: breakers, loads, demands, and that nothing depends on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journeys import HELLO, gateway, run
from prometheus_client import CollectorRegistry, generate_latest

from diptych.cluster.gateway.breaker import Breaker
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.limits import Limits
from diptych.cluster.gateway.metrics import GatewayMetrics
from diptych.cluster.gateway.money_settings import LimitSettings
from diptych.cluster.gateway.settings import BreakerSettings
from diptych.cluster.gateway.shared_state import (
    MAX_ENTRIES,
    MAX_HOLDERS,
    STALE_S,
    Board,
    BreakerNews,
    Demand,
    LoadNews,
    LocalState,
    Report,
    Snapshot,
)
from diptych.cluster.gateway.state_sync import StateSync
from diptych.cluster.gateway.testing import HANG, ScriptedTarget, Wait, fails, says
from diptych.protos.errors import DiptychError
from diptych.protos.failures import FailureKind

KIND = FailureKind


class Unreachable:
    """A state whose keeper is gone."""

    def __init__(self) -> None:
        self.calls = 0

    async def exchange(self, report: Report) -> Snapshot:
        self.calls += 1
        raise ConnectionError("the actor died")


class Silent:
    """One that never answers."""

    async def exchange(self, report: Report) -> Snapshot:
        await asyncio.sleep(HANG)
        raise AssertionError


def sync_of(gate: Gateway) -> StateSync:
    assert gate._sync is not None
    return gate._sync


def pair(*scripts: Any, state: Any = None, **more: Any) -> tuple[list[Gateway], list[ScriptedTarget]]:
    """Two gateways over a target each, both called p/a."""
    shared = state or LocalState(asyncio.get_running_loop().time)
    targets = [ScriptedTarget("p/a", list(scripts)) for _ in range(2)]
    gates = [gateway(target, ports={"shared": shared, **more}, retries=0) for target in targets]
    return gates, targets


async def fail(gate: Gateway) -> None:
    with pytest.raises(DiptychError):
        await gate.chat("chat", HELLO)


async def meet(*gates: Gateway) -> None:
    for _ in range(2):
        for gate in gates:
            assert await sync_of(gate).sync()


def test_an_opening_is_known_at_the_other_router_and_a_closing_too() -> None:
    """Each router finding out for itself costs its clients as many failures as there are routers."""

    async def job() -> None:
        gates, targets = pair([fails(KIND.NOT_FOUND)], says("x"))
        await fail(gates[0])
        await meet(*gates)
        await fail(gates[1])
        assert [len(target.requests) for target in targets] == [1, 0]
        assert gates[1].explain("chat", HELLO).candidates[0].excluded == "closed off after not_found, for 300 s more"
        await asyncio.sleep(301)
        await gates[0].chat("chat", HELLO)  # its probe is answered
        await meet(*gates)
        assert gates[1].explain("chat", HELLO).candidates[0].state == "closed"

    run(job())


def test_what_was_adopted_is_not_told_on() -> None:
    """Two routers that told each other's news as their own would keep a target closed off for ever."""

    async def job() -> None:
        gates, _ = pair([fails(KIND.QUOTA)])
        await fail(gates[0])
        await meet(*gates)
        assert [news.state for news in sync_of(gates[0]).report().breakers] == ["open"]
        assert sync_of(gates[1]).report().breakers == ()

    run(job())


def test_a_refused_key_is_nobody_elses_business() -> None:
    """Another router may have another key, and would never open again by itself."""

    async def job() -> None:
        gates, targets = pair([fails(KIND.AUTH)])
        await fail(gates[0])
        await meet(*gates)
        await fail(gates[1])
        assert [len(target.requests) for target in targets] == [1, 1]

    run(job())


def test_an_older_opening_does_not_undo_a_newer_closing() -> None:
    """Reports are as old as their way was long."""

    async def job() -> None:
        now = [100.0]
        breaker = Breaker(BreakerSettings(), lambda: now[0])
        breaker.adopt_opening(KIND.SERVER, 130.0, 100.0)
        breaker.adopt_closing(101.0)
        assert (breaker.state, breaker.changed_at, breaker.found_at) == ("closed", 101.0, None)
        gates, _ = pair(says("x"))
        await gates[0].chat("chat", HELLO)
        sync = sync_of(gates[0])
        opened = BreakerNews(target="p/a", state="open", ago_s=5.0, opens_in_s=30.0, why="server")
        closed = BreakerNews(target="p/a", state="closed", ago_s=1.0)
        await asyncio.sleep(20)
        for news, state in ((opened, "open"), (closed, "closed"), (opened, "closed")):
            sync.apply(Snapshot(num_others=1, breakers=(news,)))
            assert gates[0].explain("chat", HELLO).candidates[0].state == state
        for why, opens_in_s in (("auth", 9.0), ("no_such_kind", 9.0), ("server", float("inf")), ("server", 0.0)):
            news = BreakerNews(target="p/a", state="open", ago_s=0.0, opens_in_s=opens_in_s, why=why)
            sync.apply(Snapshot(num_others=1, breakers=(news, news)))
        sync.apply(Snapshot(num_others=1, breakers=(BreakerNews(target="p/b", state="open", ago_s=0, opens_in_s=9),)))
        assert gates[0].explain("chat", HELLO).candidates[0].state == "closed"

    run(job())


def test_requests_in_work_elsewhere_count_and_latencies_are_lent() -> None:
    """A router that has just begun sends its first requests to the slowest target otherwise."""

    async def job() -> None:
        gates, _ = pair([Wait(5), *says("x")])
        other = asyncio.create_task(gates[0].chat("chat", HELLO))
        await asyncio.sleep(1)
        await meet(*gates)
        assert gates[1].explain("chat", HELLO).candidates[0].in_flight == 1
        await other
        await meet(*gates)
        told = gates[1].explain("chat", HELLO).candidates[0]
        assert (told.in_flight, told.latency_ms) == (0, 5000.0)

    run(job())


@pytest.mark.parametrize("state", [Unreachable, Silent])
def test_without_the_others_nothing_changes(state: type[Unreachable | Silent]) -> None:
    """The keeper of the board may die or hang at any time; answers come all the same, and it is asked again."""

    async def job() -> None:
        registry = CollectorRegistry()
        targets = [ScriptedTarget("p/a", [says("x")])]
        gate = gateway(*targets, ports={"shared": state(), "metrics": GatewayMetrics(registry)})
        async with gate:
            for _ in range(5):
                assert (await gate.chat("chat", HELLO)).message.content == "x"
                await asyncio.sleep(4)
            sync_of(gate).apply(Snapshot(num_others=1, loads=(LoadNews(target="p/a", in_flight=9, latency_s=1.0),)))
            await asyncio.sleep(STALE_S)
            told = gate.explain("chat", HELLO).candidates[0]
        # What it had heard is believed until it has been alone for ten seconds; it was before, and stays so.
        assert told.state == "closed"
        assert 'state_exchanges_total{outcome="failed"}' in generate_latest(registry).decode()

    run(job())


def test_what_was_heard_is_forgotten_after_ten_seconds_alone() -> None:
    """Nine requests that were in work elsewhere an hour ago would keep a target empty for ever."""

    async def job() -> None:
        gates, _ = pair(says("x"))
        sync = sync_of(gates[0])
        sync.apply(Snapshot(num_others=1, loads=(LoadNews(target="p/a", in_flight=9, latency_s=1.0),)))
        sync._state = Unreachable()
        assert not await sync.sync()
        assert gates[0].explain("chat", HELLO).candidates[0].in_flight == 9
        await asyncio.sleep(STALE_S)
        assert not await sync.sync()
        assert gates[0].explain("chat", HELLO).candidates[0].in_flight == 0

    run(job())


def test_gateways_meet_by_themselves_while_they_are_open() -> None:
    """Nobody calls `sync` in a router: entering the gateway starts it, and closing ends it."""

    async def job() -> None:
        gates, targets = pair([fails(KIND.QUOTA)], says("x"))
        async with gates[0], gates[1]:
            await fail(gates[0])
            await asyncio.sleep(3)
            await fail(gates[1])
        assert [len(target.requests) for target in targets] == [1, 0]

    run(job())


def test_a_board_is_bounded_and_forgets_who_is_silent() -> None:
    """Names come from configurations, but a board must not grow with whatever it is told."""
    now = [0.0]
    board = Board(lambda: now[0])
    many = tuple(LoadNews(target=f"p/{i}", in_flight=1, latency_s=None) for i in range(MAX_ENTRIES + 9))
    long = BreakerNews(target="p/" + "x" * 5000, state="open", ago_s=0, opens_in_s=9, why="server")
    board.exchange(Report(holder="a", loads=many, breakers=(long,)))
    found = board.exchange(Report(holder="b"))
    assert (len(found.loads), found.breakers, found.num_others) == (MAX_ENTRIES, (), 1)
    now[0] = STALE_S + 1
    assert board.exchange(Report(holder="c")).num_others == 0
    for i in range(MAX_HOLDERS + 9):
        found = board.exchange(Report(holder=f"h{i}"))
    assert found.num_others == MAX_HOLDERS - 1


def test_the_newest_change_counts_and_ages_on_the_board() -> None:
    """`opens_in_s` of a report that lay there for three seconds is three seconds less."""
    now = [0.0]
    board = Board(lambda: now[0])
    opened = BreakerNews(target="p/a", state="open", ago_s=1.0, opens_in_s=5.0, why="server")
    board.exchange(Report(holder="a", breakers=(opened,)))
    now[0] = 3.0
    board.exchange(Report(holder="b", breakers=(BreakerNews(target="p/a", state="closed", ago_s=9.0),)))
    (news,) = board.exchange(Report(holder="c")).breakers
    assert (news.state, news.ago_s, news.opens_in_s) == ("open", 4.0, 2.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=2, max_size=5))
def test_parts_by_demand_never_exceed_the_limit(requests: list[int]) -> None:
    """All routers together keep the limit, whoever is asked how often; who is asked for nothing keeps half a part."""
    now = [0.0]
    limit = LimitSettings(requests_per_minute=6000)
    routers = [Limits(lambda: now[0]) for _ in requests]
    for router, number in zip(routers, requests, strict=True):
        router.share(len(routers))
        for _ in range(number):
            router.admit([("l", limit, "")], input_tokens=0, output_tokens=0)
    now[0] = 1.0
    demands = [router.demands() for router in routers]
    parts = []
    for i, router in enumerate(routers):
        others: dict[tuple[str, str], float] = {}
        for k, told in enumerate(demands):
            for demand in told if k != i else ():
                others[demand.limit, demand.scope] = others.get((demand.limit, demand.scope), 0.0) + demand.per_s
        router.lean(others, len(routers) - 1)
        visit = router.admit([("l", limit, "")], input_tokens=0, output_tokens=0)
        meter = visit._meters[0]
        parts.append(meter.buckets["requests"].capacity)
        assert parts[-1] >= 6000 / len(routers) / 2 - 1
    if all(requests):
        assert sum(parts) <= 6000 * 1.001
    router.lean(None, 0)
    assert visit._meters[0].buckets["requests"].capacity == 6000 / len(routers)


def test_demands_fade() -> None:
    """A burst of yesterday must not hold a part of the limit today."""
    now = [0.0]
    limits = Limits(lambda: now[0])
    limits.admit([("l", LimitSettings(requests_per_minute=60), "s")], input_tokens=0, output_tokens=0)
    now[0] = 1.0
    assert limits.demands() == (Demand(limit="l", scope="s", per_s=0.3),)
    for _ in range(20):
        now[0] += 1.0
        told = limits.demands()
    assert told == ()
