"""Real engines of the echo model, real gRPC: a killed engine costs no token, whichever it is and whenever it dies."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from small_cluster import ECHO, SETTINGS, WAIT_S, SmallCluster, connected, small_cluster

from diptych.cluster.router.call import GenerateCall
from diptych.cluster.router.placement import Placement
from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.settings import EchoSettings
from diptych.protos.types import GENERATING, EngineRef, SamplingParams

PROMPT = tuple(range(3, 43))
COUNT = 10
SLOW = SETTINGS.model_copy(update={"echo": EchoSettings(step_s=0.01)})
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0)
SAMPLED = SamplingParams(
    max_tokens=COUNT, temperature=0.9, top_k=20, seed=7, repetition_penalty=1.2, presence_penalty=0.3, logprobs=1
)


@pytest.fixture
async def cluster() -> AsyncIterator[SmallCluster]:
    """Two engines of each role; slow enough that a token can be told before the next."""
    with tempfile.TemporaryDirectory(prefix="d-") as name:  # a socket's path has little room
        folder = Path(name)
        async with small_cluster(folder, folder, num=dict.fromkeys(GENERATING, 2), settings=SLOW) as made:
            yield await connected(made)


def ref_of(cluster: SmallCluster, name: str) -> EngineRef:
    """The present life of an engine."""
    return next(ref for ref in cluster.alive if ref.engine_id == name)


async def answer(cluster: SmallCluster, sampling: SamplingParams, victim: str, at: int) -> tuple[list[int], int]:
    """The tokens of an answer by the first engines, one of which is killed when the client has `at` of them; and how
    often it was placed or moved anew.
    """
    pin = Placement(ref_of(cluster, "prefill-0"), ref_of(cluster, "decode-0"))
    dead = ref_of(cluster, victim)
    call = GenerateCall(model=ECHO, prompt=PROMPT, sampling=sampling, timeout_s=WAIT_S, pin=pin)
    tokens: list[int] = []
    session = cluster.router.view.session(dead)
    assert session is not None
    killing: asyncio.Task[None] | None = None
    async with aclosing(cluster.router.generate(call)) as deltas:
        first = asyncio.ensure_future(anext(deltas))
        while not session.in_flight and not first.done():  # noqa: ASYNC110 - a session tells nobody
            await asyncio.sleep(0)
        delta = None
        while delta is None or delta.finish is None:
            if killing is None and len(tokens) >= at:
                killing = asyncio.create_task(cluster.kill(dead))
            delta = await first if delta is None else await anext(deltas)
            tokens += delta.tokens
            if delta.logprobs is not None:
                assert len(delta.logprobs) == len(delta.tokens)
                assert all(delta.logprobs)
    assert killing is not None
    await killing
    await cluster.replace(dead)
    await connected(cluster)
    return tokens, delta.finish.attempts - 1 + delta.finish.migrations


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_killed_decode_engine_costs_no_token_whenever_it_dies(
    cluster: SmallCluster, sampling: SamplingParams
) -> None:
    wanted, anew = expected_tokens(PROMPT, COUNT, sampling), 0
    for at in range(COUNT):
        tokens, again = await answer(cluster, sampling, "decode-0", at)
        assert tokens == wanted, f"killed when the client had {at} tokens"
        anew += again
    assert anew >= COUNT // 2, "most kills came before the end"
    await cluster.at_rest()


async def test_a_killed_prefill_engine_costs_no_token_whenever_it_dies(cluster: SmallCluster) -> None:
    for at in range(3):
        tokens, _ = await answer(cluster, GREEDY, "prefill-0", at)
        assert tokens == expected_tokens(PROMPT, COUNT, GREEDY), f"killed when the client had {at} tokens"
