"""Whatever engine is lost, whenever: the client gets the very tokens it would have got, each once, and one end."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cluster.config import LimitSettings
from diptych.cluster.router.rig import PAIR, PROMPT, D, P, Rig, call, rig, until, wanted
from diptych.cluster.router.testing import EchoEngine, echo_logprobs
from diptych.protos.errors import DeadlineExceeded, EngineLost, NoBlocks, ShuttingDown
from diptych.protos.types import EngineId, EngineRef, FinishReason, Role, SamplingParams

COUNT = 8
TWO = {"d0": D, "d1": D}
FOUR = {"p0": P, "p1": P, "d0": D, "d1": D}


def once(engine: EchoEngine, name: str, value: object) -> None:
    """The fault `name` strikes the first order only."""
    usual = getattr(engine.faults, name)
    setattr(engine.faults, name, value)
    engine.on_order = lambda: setattr(engine.faults, name, value if len(engine.orders) < 2 else usual)


def the_first_dies(r: Rig, roles: frozenset[Role], at: int) -> None:
    """The first engine of these roles to come to token `at` dies there; the others live on."""
    engines = [engine for engine in r.engines.values() if engine.info.roles == roles]

    def spare() -> None:
        for engine in engines:
            engine.faults.dies_at = None

    for engine in engines:
        engine.faults.dies_at = at
        engine.on_death = spare


@pytest.mark.parametrize("at", range(COUNT + 1))
@pytest.mark.parametrize("roles", [TWO, FOUR], ids=["alone", "pairs"])
async def test_a_decode_engine_may_die_before_any_token(
    tmp_path: Path, roles: dict[str, frozenset[Role]], at: int
) -> None:
    async with rig(tmp_path, roles) as r:
        the_first_dies(r, D, at)
        tokens, finish = await r.ask(COUNT)
        assert tokens == wanted(COUNT)
        assert (finish.reason, finish.num_tokens) == (FinishReason.LENGTH, COUNT)
        assert finish.attempts + finish.migrations <= 2
        assert r.metric("diptych_engine_sessions_lost_total") == 1


@pytest.mark.parametrize("at", range(COUNT + 1))
async def test_a_stream_may_break_before_any_token_and_the_engine_that_lives_is_used_again(
    tmp_path: Path, at: int
) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        once(r.engines["d"], "drop_stream_at", at)
        tokens, finish = await r.ask(COUNT)
        assert tokens == wanted(COUNT)
        assert finish.attempts + finish.migrations == (1 if at == COUNT else 2)
        second = [order.request for order in r.engines["d"].orders][1:]
        assert all(request.resume == tuple(wanted(COUNT)[: len(request.resume)]) for request in second)


@pytest.mark.parametrize("first", [P, D], ids=["prefill first", "decode first"])
@pytest.mark.parametrize("at", range(4))
async def test_both_engines_of_a_pair_may_die(tmp_path: Path, first: frozenset[Role], at: int) -> None:
    async with rig(tmp_path, FOUR, step_s=0.002) as r:
        the_first_dies(r, P, 0 if first == P else 1)
        the_first_dies(r, D, at)
        assert (await r.ask(COUNT))[0] == wanted(COUNT)


async def test_what_follows_begins_behind_the_tokens_that_the_client_has(tmp_path: Path) -> None:
    async with rig(tmp_path, FOUR, step_s=0.002) as r:
        the_first_dies(r, D, 5)
        tokens, finish = await r.ask(COUNT)
        assert tokens == wanted(COUNT)
        assert (finish.attempts, finish.migrations) == (1, 1)
        moved = [order for e in r.engines.values() for order in e.orders if order.request.key.attempt == 1]
        assert len(moved) == 2, "a prefill and a decode engine"
        for order in moved:
            assert order.request.resume == tuple(wanted(COUNT)[: len(order.request.resume)])
            assert 1 <= len(order.request.resume) <= 5
            assert order.request.prompt == PROMPT
            assert order.request.sampling.max_tokens == COUNT, "counted from the answer's begin"
        assert r.metric("diptych_migrations_total") == 1
        assert r.metric("diptych_recovery_seconds_count") == 1
        [loss] = r.router.losses
        assert (loss.engine[0], loss.epoch, loss.cause) == ("d", 1, "broken")


async def test_the_other_engine_of_a_broken_pair_is_told_to_stop(tmp_path: Path) -> None:
    async with rig(tmp_path, {"p": P, "d0": D, "d1": D}, step_s=0.002) as r:
        r.engines["p"].faults.silent = True
        for name in TWO:
            r.engines[name].faults.also_first_token = True
        the_first_dies(r, D, 3)
        asking = asyncio.create_task(r.ask(COUNT))
        await until(lambda: len(r.engines["p"].orders) == 2)
        first = r.engines["p"].orders[0].request.key
        await until(lambda: first in r.engines["p"].cancels)
        assert (await asking)[0] == wanted(COUNT)


async def test_three_choices_of_one_request_move_together_and_each_keeps_its_tokens(tmp_path: Path) -> None:
    async with rig(tmp_path, FOUR, step_s=0.001) as r:
        the_first_dies(r, D, 4)
        first = await r.ask(1)
        assert first[0] == wanted(1)
        answers = await asyncio.gather(*(r.ask(COUNT) for _ in range(3)))
        assert [tokens for tokens, _ in answers] == [wanted(COUNT)] * 3


async def test_logprobs_come_once_for_each_token_and_the_prompts_only_with_the_first(tmp_path: Path) -> None:
    async with rig(tmp_path, FOUR, step_s=0.002) as r:
        the_first_dies(r, D, 4)
        sampling = SamplingParams(max_tokens=COUNT, logprobs=2, prompt_logprobs=1)
        deltas = await r.deltas(replace(call(), sampling=sampling))
        assert [token for delta in deltas for token in delta.tokens] == wanted(COUNT)
        assert [one for delta in deltas for one in delta.logprobs or []] == [echo_logprobs(t, 2) for t in wanted(COUNT)]
        told = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
        assert told == [[echo_logprobs(token, 1) for token in PROMPT[1:]]]
        moved = [order for e in r.engines.values() for order in e.orders if order.request.resume]
        assert moved
        assert all(order.request.sampling.prompt_logprobs is None for order in moved)


async def test_a_stop_token_ends_a_moved_answer_where_it_would_have_ended(tmp_path: Path) -> None:
    async with rig(tmp_path, TWO, step_s=0.002) as r:
        the_first_dies(r, D, 3)
        sampling = SamplingParams(max_tokens=50, stop_token_ids=frozenset({PROMPT[5]}))
        deltas = await r.deltas(replace(call(), sampling=sampling))
        assert [token for delta in deltas for token in delta.tokens] == wanted(6)
        assert deltas[-1].finish is not None
        assert deltas[-1].finish.reason is FinishReason.STOP


async def test_an_answer_that_was_whole_when_its_engine_died_needs_no_other(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        r.engines["d"].faults.drop_stream_at = COUNT
        tokens, finish = await r.ask(COUNT)
        assert tokens == wanted(COUNT)
        assert (finish.reason, finish.num_tokens, finish.migrations) == (FinishReason.LENGTH, COUNT, 0)


async def test_the_client_may_end_an_answer_after_it_was_moved(tmp_path: Path) -> None:
    async with rig(tmp_path, TWO, step_s=0.001) as r:
        the_first_dies(r, D, 3)
        got: list[int] = []
        async with aclosing(r.router.generate(call(1000))) as deltas:
            delta = await anext(deltas)
            while delta.finish is None:
                got += delta.tokens
                delta = await deltas.asend(len(got) >= 6)
        assert got == wanted(len(got))
        assert (delta.finish.reason, delta.finish.num_tokens) == (FinishReason.STOP, len(got))


async def test_a_client_that_leaves_during_a_move_leaves_nothing_behind(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        engine = r.engines["d"]
        engine.faults.dies_at = 3
        asking = asyncio.create_task(r.ask(COUNT))
        await until(lambda: bool(r.router.losses))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_the_deadline_ends_a_move_that_finds_no_engine(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        r.engines["d"].faults.dies_at = 4
        got: list[int] = []

        async def read() -> None:
            async for delta in r.router.generate(call(timeout_s=0.3)):
                got.extend(delta.tokens)

        with pytest.raises(DeadlineExceeded):
            await read()
        assert got == wanted(len(got))


async def test_a_request_moves_so_often_and_no_more(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, migration_limit=2) as r:
        engine = r.engines["d"]
        engine.faults.drop_stream_at = 3
        engine.on_order = lambda: setattr(engine.faults, "drop_stream_at", 2 + len(engine.orders))
        got: list[int] = []

        async def read() -> None:
            async for delta in r.router.generate(call()):
                got.extend(delta.tokens)

        with pytest.raises(EngineLost):
            await read()
        assert got == wanted(5)
        assert len(engine.orders) == 3
        assert r.metric("diptych_migrations_total") == 3, "two that were done, one that failed"


async def test_with_a_limit_of_nothing_a_break_after_the_first_token_is_the_answer(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, migration_limit=0, step_s=0.005) as r:  # the break is seen after the first token
        r.engines["d"].faults.drop_stream_at = 3
        with pytest.raises(EngineLost):
            await r.ask(COUNT)
        assert len(r.engines["d"].orders) == 1


async def test_a_tenant_pays_for_its_retries_and_moves(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, retry_budget=0.5, retry_burst=1) as r:
        engine = r.engines["d"]
        engine.faults.drop_stream_at = 3
        engine.on_order = lambda: setattr(engine.faults, "drop_stream_at", 3 if len(engine.orders) % 2 else None)
        assert (await r.ask(COUNT))[0] == wanted(COUNT)
        with pytest.raises(EngineLost):
            await r.ask(COUNT)
        assert r.metric("diptych_retry_budget_refused_total") == 1
        engine.on_order = lambda: None
        engine.faults.drop_stream_at = None
        assert (await r.ask(COUNT))[0] == wanted(COUNT)
        assert r.router.recovery.budget.left("") == 1


async def test_a_moved_request_waits_for_an_engine_that_is_full(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        engine = r.engines["d"]
        engine.faults.drop_stream_at = 3

        def refuse_twice() -> None:
            engine.faults.drop_stream_at = None if len(engine.orders) > 1 else 3
            engine.faults.error = NoBlocks("full") if 1 < len(engine.orders) < 4 else None

        engine.on_order = refuse_twice
        tokens, finish = await r.ask(COUNT)
        assert tokens == wanted(COUNT)
        assert len(engine.orders) == 4
        assert r.router.recovery.budget.left("") == r.router.settings.limits.max_running - 1, "one move"
        assert finish.attempts == 1


async def test_a_draining_engines_refusal_costs_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path, TWO, retry_burst=1, retry_budget=0) as r:
        r.engines["d0"].faults.error = ShuttingDown("going")
        for _ in range(3):
            tokens, finish = await r.ask(COUNT)
            assert tokens == wanted(COUNT)
            assert finish.decode_engine == "d1"
        assert r.router.recovery.budget.left("") == 1


async def test_engines_that_disagree_about_a_token_cost_a_move_and_not_the_answer(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        r.engines["d"].faults.also_first_token = r.engines["d"].faults.wrong_first_token = True
        for _ in range(50):  # an answer that is over before the second engine's word comes has no disagreement
            tokens, finish = await r.ask(COUNT)
            assert tokens[1:] == wanted(COUNT)[1:]
            assert tokens[0] in (PROMPT[0], PROMPT[0] + 1), "whichever came first is what the client has"
            assert finish.migrations + finish.attempts == 1 + r.metric("diptych_disagreements_total")
            if finish.migrations + finish.attempts == 2:
                return
        raise AssertionError("no answer had two engines' words")


async def test_requests_wait_for_an_engine_that_has_just_died(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        engine = r.engines["d"]
        engine.faults.dies_at = 3
        moved = asyncio.create_task(r.ask(COUNT))
        await until(lambda: bool(r.router.losses))
        r.directory.set([])
        await until(lambda: not list(r.router.view.sessions()))
        fresh = asyncio.create_task(r.ask(COUNT))
        reborn = EchoEngine(f"unix:{tmp_path}/2", engine_id="d", roles=D, epoch=2)
        await reborn.start()
        r.directory.set([reborn.info])
        assert (await moved)[0] == wanted(COUNT)
        assert (await fresh)[0] == wanted(COUNT)
        assert all(order.request.resume == tuple(wanted(len(order.request.resume))) for order in reborn.orders)
        assert len(reborn.orders) == 2
        await r.router.view.stop()
        await reborn.stop()


async def test_without_any_engine_and_none_expected_the_refusal_is_immediate(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, connect_timeout_s=3600, limits=LimitSettings(request_timeout_s=3600)) as r:
        info = replace(r.engines["d"].info, draining=True)
        r.directory.set([info])
        await until(lambda: not r.router.is_ready("echo"))
        r.directory.set([])
        await until(lambda: not list(r.router.view.sessions()))
        with pytest.raises(EngineLost):
            await r.ask(COUNT)


async def test_a_stopped_engine_is_lost_by_its_silence_and_never_heard_again(tmp_path: Path) -> None:
    async with rig(tmp_path, FOUR, step_s=0.005, silence_s=0.5) as r:
        asking = [asyncio.create_task(r.ask(60)) for _ in range(6)]
        await until(lambda: all(engine.open_orders for name, engine in r.engines.items() if name[0] == "d"))
        r.engines["d0"].faults.is_stopped = True
        await until(lambda: bool(r.router.losses))
        r.engines["d0"].faults.is_stopped = False
        answers = [await one for one in asking]
        assert [tokens for tokens, _ in answers] == [wanted(60)] * 6
        assert any(finish.migrations for _, finish in answers)
        [loss] = r.router.losses
        assert (loss.engine, loss.cause) == ("d0", "silent")


async def test_engines_that_say_nothing_but_their_status_are_not_lost(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, silence_s=0.5) as r:
        r.engines["d"].faults.silent = r.engines["p"].faults.silent = True
        with pytest.raises(DeadlineExceeded):
            await r.deltas(call(timeout_s=1.2))
        assert not r.router.losses


async def test_a_process_that_is_stopped_is_noticed_by_its_silence_and_is_welcome_when_it_goes_on(
    tmp_path: Path,
) -> None:
    """Its kernel still acknowledges everything: only its frames are missing."""
    async with rig(tmp_path, TWO, step_s=0.005, silence_s=0.5) as r:
        target = f"unix:{tmp_path}/s"
        arguments = ("--target", target, "--engine-id", "s", "--roles", "decode", "--step-ms", "5")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "diptych.cluster.router.testing", *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            await process.stdout.readline()
            ref = EngineRef(EngineId("s"), 1, target)
            infos = [engine.info for engine in r.engines.values()]
            r.directory.set([*infos, replace(infos[0], ref=ref)])
            await until(lambda: r.ready() == 3)
            asking = [asyncio.create_task(r.ask(80)) for _ in range(6)]
            session = r.router.view.session(ref)
            assert session is not None
            await until(lambda: session.in_flight > 0)
            process.send_signal(signal.SIGSTOP)
            answers = [await one for one in asking]
            assert [tokens for tokens, _ in answers] == [wanted(80)] * 6
            assert [(loss.engine, loss.cause) for loss in r.router.losses] == [("s", "silent")]
            process.send_signal(signal.SIGCONT)
            await until(lambda: r.ready() == 3)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            await process.wait()
        r.directory.set(infos)
        await until(lambda: r.ready() == 2)
