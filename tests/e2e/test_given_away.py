"""A pool whose engines all leave, one after the other, under one answer: it loses no token and pays no move."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from small_cluster import ECHO, SETTINGS, WAIT_S, connected, small_cluster

from diptych.cluster.engine.engine import Engine
from diptych.cluster.router.call import GenerateCall
from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.settings import EchoSettings
from diptych.protos.types import Role, SamplingParams

PROMPT = tuple(range(3, 43))
COUNT = 40
SLOW = SETTINGS.model_copy(update={"echo": EchoSettings(step_s=0.02)})
SAMPLED = SamplingParams(max_tokens=COUNT, temperature=0.9, top_k=20, seed=7, repetition_penalty=1.2, logprobs=1)


def drained(engine: Engine) -> None:
    engine.drain(0.0)


def decoding_no_more(engine: Engine) -> None:
    """As a change of role does when its grace ends."""
    engine._asyncio_thread.call(engine._sessions.leave_roles({Role.DECODE}), WAIT_S)
    engine._give_away({Role.DECODE})


@pytest.mark.parametrize("leaves", [drained, decoding_no_more])
async def test_an_answer_outlives_more_planned_departures_than_it_has_moves(leaves: Callable[[Engine], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="d-") as name:  # a socket's path has little room
        folder, num = Path(name), {Role.PREFILL: 1, Role.DECODE: 5}
        async with small_cluster(folder, folder, num=num, settings=SLOW) as made:
            cluster = await connected(made)
            limit = cluster.router.settings.migration_limit
            call = GenerateCall(model=ECHO, prompt=PROMPT, sampling=SAMPLED, timeout_s=WAIT_S)
            tokens: list[int] = []
            left = 0
            async with aclosing(cluster.router.generate(call)) as deltas:
                async for delta in deltas:
                    tokens += delta.tokens
                    if delta.finish is None and len(tokens) >= 4 * (left + 1) and left < limit + 2:
                        assert delta.placement is not None
                        await asyncio.to_thread(leaves, cluster.alive[delta.placement.decode])
                        left += 1
            assert left == limit + 2
            assert tokens == expected_tokens(PROMPT, COUNT, SAMPLED)
            assert delta.finish is not None
            assert delta.finish.num_tokens == COUNT
            await cluster.at_rest()
