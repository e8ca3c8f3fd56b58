"""Logprobs of tokens and prompts through the router: each once, beside its token, from whichever engine told them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cluster.router.call import GenerateCall
from diptych.cluster.router.rig import PAIR, PROMPT, D, P, call, rig, until, wanted
from diptych.cluster.router.testing import echo_logprobs
from diptych.protos import engine_pb2 as pb
from diptych.protos.codec import prompt_logprobs_to_pb
from diptych.protos.errors import EngineLost
from diptych.protos.types import PromptLogprobs, Role, SamplingParams


def asking(**sampling: int) -> GenerateCall:
    return replace(call(), sampling=SamplingParams(max_tokens=8, **sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize("roles", [PAIR, {"d": D}])
async def test_logprobs_reach_the_caller_beside_their_tokens(tmp_path: Path, roles: dict[str, frozenset[Role]]) -> None:
    async with rig(tmp_path, roles, tokens_per_step=3) as r:
        deltas = await r.deltas(asking(logprobs=2, prompt_logprobs=1))
        told = [one for delta in deltas for one in delta.logprobs or []]
        assert told == [echo_logprobs(token, 2) for token in wanted(8)]
        assert deltas[0].prompt_logprobs == [echo_logprobs(token, 1) for token in PROMPT[1:]]
        assert all(delta.prompt_logprobs is None for delta in deltas[1:])
        assert r.engines["d"].orders[0].request.sampling.logprobs == 2


@pytest.mark.parametrize("num_lost", [0, 1])
@pytest.mark.parametrize("swap", [False, True])
async def test_prompt_logprobs_of_two_tellers_and_of_a_retry_come_once_whole_and_in_order(
    tmp_path: Path, num_lost: int, swap: bool
) -> None:
    """Both engines tell all of them; of a lost attempt half of them had come."""
    async with rig(tmp_path, {"p0": P, "p1": P, "d": D}, tokens_per_step=3) as r:
        r.engines["d"].faults.also_first_token = True
        r.engines["d"].faults.swap_pairs = swap
        if num_lost:
            r.engines["d"].on_order = lambda: setattr(r.engines["d"].faults, "silent", len(r.engines["d"].orders) < 2)
            for name in ("p0", "p1"):
                r.engines[name].faults.silent = True
        task = asyncio.create_task(r.deltas(asking(prompt_logprobs=1)))
        if num_lost:
            await until(lambda: any(r.engines[name].orders for name in ("p0", "p1")))
            lost = next(r.engines[name] for name in ("p0", "p1") if r.engines[name].orders)
            for name in ("p0", "p1"):
                r.engines[name].faults.silent = False
            [session] = lost._sessions
            half = PromptLogprobs(lost.orders[0].request.key, 1, tuple(echo_logprobs(9, 1) for _ in range(9)))
            step = pb.StepTokens(prompt_logprobs=[prompt_logprobs_to_pb(1, half)])
            session.outbox.put_nowait(pb.EngineFrame(tokens=step))
            lost.drop_streams()
        deltas = await task
        assert [token for delta in deltas for token in delta.tokens] == wanted(8)
        assert deltas[0].prompt_logprobs == [echo_logprobs(token, 1) for token in PROMPT[1:]]
        assert all(delta.prompt_logprobs is None for delta in deltas[1:])
        assert deltas[-1].finish is not None
        assert deltas[-1].finish.attempts == 1 + num_lost


async def test_a_prompt_of_one_token_has_no_logprobs_and_waits_for_none(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        deltas = await r.deltas(replace(asking(prompt_logprobs=0), prompt=(5,)))
        assert deltas[0].prompt_logprobs == []


async def test_nobody_who_did_not_ask_gets_logprobs(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        deltas = await r.deltas(call())
        assert all(delta.logprobs is None and delta.prompt_logprobs is None for delta in deltas)


async def test_an_engine_that_keeps_the_prompts_logprobs_to_itself_fails_the_request(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}, max_attempts=1) as r:
        r.engines["d"].faults.no_prompt_logprobs = True
        with pytest.raises(EngineLost, match="logprobs"):
            await r.deltas(asking(prompt_logprobs=0))


async def test_a_prefill_engine_lost_amid_the_prompts_logprobs_is_replaced(tmp_path: Path) -> None:
    """Its token 0 has come, but nothing has reached the client yet: the decode engine knows tokens only."""
    async with rig(tmp_path, PAIR) as r:
        engine = r.engines["p"]
        engine.faults.silent = True
        r.engines["d"].on_order = lambda: setattr(r.engines["d"].faults, "silent", len(r.engines["d"].orders) < 2)
        task = asyncio.create_task(r.deltas(asking(prompt_logprobs=0)))
        await until(lambda: bool(engine.orders))
        [session] = engine._sessions
        session.outbox.put_nowait(pb.EngineFrame(tokens=pb.StepTokens(handle=[1], index=[0], token=[PROMPT[0]])))
        engine.drop_streams()
        deltas = await task
        assert [token for delta in deltas for token in delta.tokens] == wanted(8)
        assert deltas[0].prompt_logprobs == [echo_logprobs(token, 0) for token in PROMPT[1:]]
