"""Real engines of the echo model, real gRPC: steps that raise cost no token and leave nothing behind."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from small_cluster import ECHO, WAIT_S, SmallCluster, connected, small_cluster

from diptych.cluster.router.call import GenerateCall
from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.faults import Action, FaultRule, FaultSettings, Point
from diptych.protos.types import GENERATING, Role, SamplingParams

COUNT = 24
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0)


async def answer(cluster: SmallCluster, prompt: tuple[int, ...]) -> list[int]:
    call = GenerateCall(model=ECHO, prompt=prompt, sampling=GREEDY, timeout_s=WAIT_S)
    return [token async for delta in cluster.router.generate(call) for token in delta.tokens]


@pytest.mark.parametrize("role", list(GENERATING))
async def test_steps_that_raise_cost_no_token(role: Role) -> None:
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.RAISE, engine=f"{role}-0", nth=(5, 8, 16, 30))
    with tempfile.TemporaryDirectory(prefix="d-") as name:  # a socket's path has little room
        folder = Path(name)
        async with small_cluster(
            folder, folder, num=dict.fromkeys(GENERATING, 2), faults=FaultSettings(rules=(rule,))
        ) as cluster:
            await connected(cluster)
            prompts = [tuple(range(3 + i, 43 + i)) for i in range(12)]
            answers = await asyncio.gather(*(answer(cluster, prompt) for prompt in prompts))
            assert answers == [expected_tokens(prompt, COUNT, GREEDY) for prompt in prompts]
            assert cluster.count(role, f"{role}_step_faults_total") > 0
            assert not cluster.router.losses
            await cluster.at_rest()
