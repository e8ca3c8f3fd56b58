"""A step that raises costs nobody a token: its requests go on elsewhere, and who makes every step raise is found."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cluster.router.gate import MAX_STRIKES
from diptych.cluster.router.rig import PAIR, PROMPT, D, P, Rig, call, rig, until, wanted
from diptych.protos.errors import EngineFault, Quarantined

COUNT = 8
POISON = 666
BAD = replace(call(), prompt=(*PROMPT[:5], POISON))
FOUR = {"p0": P, "p1": P, "d0": D, "d1": D}


def raise_once(r: Rig, name: str, at: int) -> None:
    """The first order to come to token `at` on that engine ends with a fault; the others live on."""
    faults = r.engines[name].faults
    faults.error, faults.error_at, faults.error_count = EngineFault("a step raised"), at, 1


@pytest.mark.parametrize("at", range(COUNT))
async def test_a_decode_step_that_raises_costs_a_placement_and_no_token(tmp_path: Path, at: int) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        raise_once(r, "d", at)
        tokens, finish = await r.ask(COUNT)
        assert tokens == wanted(COUNT)
        assert (finish.attempts, finish.migrations) == ((2, 0) if at == 0 else (1, 1))
        assert not r.router.losses, "the engine lives"
        first, second = r.engines["d"].orders
        assert second.request.key == replace(first.request.key, attempt=1)


async def test_a_prefill_step_that_raises_costs_no_token(tmp_path: Path) -> None:
    async with rig(tmp_path, {"p0": P, "p1": P, "d": D}) as r:
        raise_once(r, "p0", 0)
        assert (await r.ask(COUNT))[0] == wanted(COUNT)
        assert [len(r.engines[name].orders) for name in ("p0", "p1")] == [1, 1], "the other one is tried"


async def test_steps_that_raise_do_not_use_up_the_moves_of_those_who_were_in_them(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, migration_limit=1) as r:
        engine = r.engines["d"]
        engine.faults.error, engine.faults.error_count = EngineFault("a step raised"), 4
        engine.on_order = lambda: setattr(engine.faults, "error_at", len(engine.orders))
        tokens, finish = await r.ask(COUNT)
        assert tokens == wanted(COUNT)
        assert finish.migrations == 4
        assert r.metric("diptych_quarantined_total") == 0, "each of its engines made a token"


async def test_with_a_limit_of_nothing_a_step_that_raises_is_the_answer(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, migration_limit=0) as r:
        raise_once(r, "d", 3)
        with pytest.raises(EngineFault):
            await r.ask(COUNT)


async def test_a_request_whose_every_step_raises_is_refused_and_its_company_is_answered(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d0": D, "d1": D}, step_s=0.002, migration_limit=1) as r:
        for engine in r.engines.values():
            engine.faults.raises_on = POISON
        innocent = [asyncio.create_task(r.ask(40)) for _ in range(8)]
        await until(lambda: all(engine.open_orders >= 4 for engine in r.engines.values()))
        with pytest.raises(Quarantined, match="failed each time"):
            await r.deltas(BAD)
        assert [tokens for tokens, _ in [await one for one in innocent]] == [wanted(40)] * 8
        raised = sum(engine.num_raised for engine in r.engines.values())
        assert 2 <= raised <= MAX_STRIKES
        with pytest.raises(Quarantined):
            await r.deltas(BAD)
        assert sum(engine.num_raised for engine in r.engines.values()) == raised, "not tried again"


async def test_tokens_of_prefill_engines_do_not_hide_who_fells_every_decode_step(tmp_path: Path) -> None:
    """Each attempt brought one more token from a prefill engine, which cleared the request each time."""
    async with rig(tmp_path, FOUR, step_s=0.002) as r:
        for name in ("d0", "d1"):
            r.engines[name].faults.raises_on = POISON
        with pytest.raises(Quarantined):
            await r.deltas(BAD)
        assert r.engines["d0"].num_raised + r.engines["d1"].num_raised == 2


async def test_who_has_a_strike_gets_no_fallback_and_so_puts_one_engine_at_risk_at_a_time(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        raise_once(r, "d", 1)
        assert (await r.ask(COUNT))[0] == wanted(COUNT)
        first, second, *_ = r.engines["d"].orders
        assert [getattr(order, "allow_local_prefill", None) for order in (first, second)] == [True, False]
