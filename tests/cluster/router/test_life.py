"""A request's states: only those that may follow do, each has its time, and an end from outside reaches all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.config import LimitSettings
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.cluster.router import registry as registry_module
from diptych.cluster.router.life import ENDS, FOLLOWS, Interrupts, Life, State, Wrongs, WrongTransition
from diptych.cluster.router.registry import Registry, TrackedRequest
from diptych.cluster.router.rig import PAIR, D, Rig, call, rig, until
from diptych.protos.errors import (
    Cancelled,
    DeadlineExceeded,
    FirstTokenTimeout,
    NoBlocks,
    Overloaded,
    ShuttingDown,
)


class Clock:
    """Goes on by a second each time that it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def life(*, is_strict: bool = True, metrics: RouterMetrics | None = None) -> Life:
    return Life("it", clock=Clock(), since=0.0, wrongs=Wrongs(metrics or RouterMetrics(), is_strict))


@given(st.lists(st.sampled_from(list(State)), max_size=12))
def test_any_walk_either_keeps_to_the_table_or_raises(walk: list[State]) -> None:
    """Guards against a driver that skips a state unseen, and times that are lost on the way."""
    one = life()
    for state in walk:
        if state in FOLLOWS[one.state]:
            one.enter(state)
            assert one.state is state
        else:
            before = one.state
            with pytest.raises(WrongTransition, match=f"from {before} to {state}"):
                one.enter(state)
            assert one.state is before
            break
    told = one.seconds()
    assert all(spent > 0 for spent in told.values())
    assert ENDS.isdisjoint(told)


def test_every_state_can_be_reached_and_left_for_an_end() -> None:
    """Guards against a table with an island, or with a state that a cancelled request cannot leave."""
    reached, edge = {State.RECEIVED}, {State.RECEIVED}
    while edge:
        edge = {after for state in edge for after in FOLLOWS[state]} - reached
        reached |= edge
    assert reached == set(State)
    assert all({State.CANCELLED, State.FAILED} <= FOLLOWS[state] for state in set(State) - ENDS)


def test_a_wrong_transition_in_production_is_counted_and_logged_and_ends_no_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Guards against an assertion about bookkeeping that costs a client its answer."""
    metrics = RouterMetrics()
    one = life(is_strict=False, metrics=metrics)
    with caplog.at_level(logging.ERROR):
        one.enter(State.DECODING)
    assert one.state is State.DECODING
    assert "received" in caplog.text
    assert "decoding" in caplog.text
    assert b'diptych_wrong_transitions_total{after="decoding",before="received"} 1.0' in metrics.render()
    one.end()
    one.enter(State.QUEUED)
    assert one.state is State.FINISHED


@pytest.mark.parametrize(
    ("error", "before", "state", "code"),
    [
        (None, State.DECODING, State.FINISHED, ""),
        (Cancelled("by id"), State.DECODING, State.CANCELLED, "cancelled"),
        (GeneratorExit(), State.QUEUED, State.CANCELLED, "cancelled"),
        (Overloaded("full"), State.QUEUED, State.REFUSED, "overloaded"),
        (DeadlineExceeded("late"), State.QUEUED, State.FAILED, "deadline_exceeded"),
        (NoBlocks("full"), State.MOVING, State.FAILED, "no_kv_blocks"),
        (ValueError("secret"), State.DECODING, State.FAILED, "internal_error"),
    ],
)
def test_how_a_request_ends(error: BaseException | None, before: State, state: State, code: str) -> None:
    one = life(is_strict=False)
    one.enter(before)
    one.end(error)
    assert (one.state, one.error_code) == (state, code)
    assert "secret" not in one.error_message
    one.end(Cancelled("too late"))
    assert one.state is state


# ---- interrupts ---------------------------------------------------------------------------------


async def test_an_interrupt_ends_a_wait_and_leaves_the_task_whole() -> None:
    interrupts = Interrupts()
    asyncio.get_running_loop().call_soon(interrupts.fire, Cancelled("now"))
    with pytest.raises(Cancelled), interrupts:
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(Cancelled), interrupts:
        pytest.fail("what was interrupted before begins nothing")


async def test_an_interrupt_between_two_waits_is_told_at_the_next() -> None:
    interrupts = Interrupts()
    with interrupts:
        await asyncio.sleep(0)
    interrupts.fire(Cancelled("between"))
    await asyncio.sleep(0)
    with pytest.raises(Cancelled), interrupts:
        await asyncio.sleep(0)


async def test_who_cancels_the_task_meanwhile_has_his_way() -> None:
    """Guards against a disconnect that is swallowed because the request was cancelled by id at the same moment."""
    interrupts = Interrupts()

    async def wait() -> None:
        with interrupts:
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    interrupts.fire(Cancelled("by id"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---- a request that is driven by the router -----------------------------------------------------


class Asked:
    """A tracked request, and its answer under way."""

    def __init__(self, r: Rig, max_tokens: int = 8, **fields: object) -> None:
        self.rig = r
        self.tracked: TrackedRequest | None = None
        self.task = asyncio.create_task(self._run(max_tokens, fields))

    async def _run(self, max_tokens: int, fields: dict[str, object]) -> int:
        requests = self.rig.router.requests
        with requests.request("r", tenant="t", endpoint="/", born=self.rig.router.clock()) as self.tracked:
            wanted = replace(call(max_tokens), tracked=self.tracked, tenant="t", **fields)  # type: ignore[arg-type]
            return sum([len(delta.tokens) async for delta in self.rig.router.generate(wanted)])

    def is_in(self, state: State) -> bool:
        return self.tracked is not None and self.tracked.state is state


@asynccontextmanager
async def _busy(tmp_path: Path) -> AsyncIterator[Rig]:
    limits = LimitSettings(max_running=1, request_timeout_s=30)
    async with rig(tmp_path, PAIR, step_s=0.01, limits=limits) as r:
        first = asyncio.create_task(r.ask(4000))
        await until(lambda: r.router.admission.running == 1)
        try:
            yield r
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)


@asynccontextmanager
async def _unreachable(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path, {"d": D}, connect_timeout_s=20) as r:
        info = r.engines["d"].info
        gone = replace(info, ref=replace(info.ref, epoch=2, target=f"unix:{tmp_path}/nobody"))
        r.directory.set([gone])
        await until(lambda: r.ready() == 0)
        yield r


@asynccontextmanager
async def _with_faults(tmp_path: Path, change: Callable[[Rig], None], step_s: float) -> AsyncIterator[Rig]:
    async with rig(tmp_path, {"a": D, "b": D}, step_s=step_s) as r:
        change(r)
        yield r


def _silence(r: Rig) -> None:
    for engine in r.engines.values():
        engine.faults.silent = True


def _draining(r: Rig) -> None:
    for engine in r.engines.values():
        engine.faults.error = ShuttingDown("it drains")  # tried elsewhere, after ever longer pauses


WORLDS = {
    State.QUEUED: _busy,
    State.PLACING: _unreachable,
    State.PLACED: lambda path: _with_faults(path, _silence, 0.0),
    State.PREFILLING: lambda path: _with_faults(path, lambda r: None, 20.0),
    State.DECODING: lambda path: _with_faults(path, lambda r: None, 0.01),
    State.MOVING: lambda path: _with_faults(path, _draining, 0.0),
}


@pytest.mark.parametrize("how", ["by id", "by disconnect"])
@pytest.mark.parametrize("state", WORLDS)
async def test_a_request_is_cancelled_in_every_state(tmp_path: Path, state: State, how: str) -> None:
    """Guards against a wait that a cancel does not reach. The rig's end checks that nothing is left."""
    async with WORLDS[state](tmp_path) as r:
        asked = Asked(r, 4000)
        await until(lambda: asked.is_in(state))
        if how == "by id":
            assert asked.tracked is not None
            assert asked.tracked.cancel()
            assert not asked.tracked.cancel()
            with pytest.raises(Cancelled, match="POST /v1/requests/r/cancel"):
                await asked.task
        else:
            asked.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked.task
        found = r.router.requests.find("r", "t")
        assert found is not None
        assert found.state is State.CANCELLED
        assert found.lives[0].state is State.CANCELLED
        assert found.error_code == "cancelled"
        await until(lambda: all(engine.open_orders == 0 or r.router.admission.running for engine in r.engines.values()))
        assert r.metric("diptych_wrong_transitions_total") == 0


@pytest.mark.parametrize("state", sorted(set(WORLDS) - {State.DECODING}))
async def test_without_a_token_in_its_time_a_request_ends_in_every_state(tmp_path: Path, state: State) -> None:
    async with WORLDS[state](tmp_path) as r:
        asked = Asked(r, 4000, first_token_timeout_s=0.3)
        with pytest.raises(FirstTokenTimeout, match=r"first_token_timeout_s, 0.3 s"):
            await asked.task
        found = r.router.requests.find("r", "t")
        assert found is not None
        assert (found.state, found.error_code) == (State.FAILED, "first_token_timeout")


async def test_after_the_first_token_its_timeout_counts_no_more(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, step_s=0.02) as r:
        asked = Asked(r, 30, first_token_timeout_s=0.3)
        assert await asked.task == 30
    async with rig(tmp_path, PAIR, step_s=0.02, limits=LimitSettings(first_token_timeout_s=0.01)) as r:
        with pytest.raises(FirstTokenTimeout):
            await r.ask(30)


async def test_a_life_tells_its_attempts_and_times(tmp_path: Path) -> None:
    async with rig(tmp_path, {"a": D, "b": D}) as r:
        _draining(r)
        r.engines["a"].faults.error_count = r.engines["b"].faults.error_count = 1
        asked = Asked(r, 5)
        assert await asked.task == 5
        found = r.router.requests.find("r", "t")
        assert found is not None
        (one,) = found.lives
        assert one.state is State.FINISHED
        assert one.num_placements == len(one.placements) >= 2
        assert [placed.ended_by for placed in one.placements][:-1] == ["shutting_down"] * (one.num_placements - 1)
        assert one.placements[-1].ended_by == ""
        assert one.num_tokens == 5
        assert one.num_prompt_tokens == 20
        told = one.seconds()
        assert list(told)[:3] == [State.RECEIVED, State.QUEUED, State.PLACING]
        assert sum(told.values()) == pytest.approx(found.ended_at - found.born, abs=0.05)


# ---- the registry -------------------------------------------------------------------------------


def test_what_ended_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a memory that grows, and against a tenant that pushes out the requests of all others."""
    monkeypatch.setattr(registry_module, "MAX_ENDED", 10)
    monkeypatch.setattr(registry_module, "MAX_ENDED_OF_TENANT", 4)
    now = [0.0]
    registry = Registry(RouterMetrics(), clock=lambda: now[0])

    def one(name: str, tenant: str) -> None:
        now[0] += 1
        with registry.request(name, tenant=tenant, endpoint="/", born=now[0]):
            pass

    one("mine", "me")
    for i in range(50):
        one(f"hog-{i}", "hog")
    assert registry.find("mine", "me") is not None
    assert registry.find("mine", "hog") is None
    assert [found.id for found in registry.latest("hog", limit=9)] == ["hog-49", "hog-48", "hog-47", "hog-46"]
    for i in range(50):
        one(f"many-{i}", f"tenant-{i}")
    assert len(registry) == 10
    now[0] += registry_module.KEPT_S
    assert registry.find("many-49", "tenant-49") is None
    assert len(registry) == 0
    assert registry._ended_of == {}


def test_a_request_is_as_its_choices_are() -> None:
    registry = Registry(RouterMetrics(), clock=lambda: 0.0)
    with registry.request("r", tenant="", endpoint="/", born=0.0) as tracked:
        assert tracked.state is State.RECEIVED
        _, first = registry.begin(tracked, model="m", born=0.0)
        _, second = registry.begin(tracked, model="m", born=0.0)
        first.enter(State.QUEUED)
        assert tracked.state is State.QUEUED
        first.end(GeneratorExit())
        assert tracked.state is State.RECEIVED
        second.end(GeneratorExit())
        assert tracked.state is State.DECODING
        assert registry.latest("", limit=5, state=State.DECODING) == [tracked]
    assert tracked.state is State.CANCELLED
    with registry.request("s", tenant="", endpoint="/", born=0.0) as tracked:
        tracked.cancel()
        _, late = registry.begin(tracked, model="m", born=0.0)
        assert isinstance(late.interrupts.error, Cancelled)
