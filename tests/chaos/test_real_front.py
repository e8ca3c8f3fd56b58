"""The client against the product's own listener and engines, without Ray: a right cluster is told to be right."""

from __future__ import annotations

import tempfile
from pathlib import Path

from drive import leaving
from load import Asks, Target, burst
from oracle import Verdict
from small_cluster import ECHO, small_cluster

from diptych.kernels.echo.testing import expected_tokens


async def test_answers_of_the_real_thing_are_right_and_explained() -> None:
    asks = Asks(expected_tokens, seed=11, prompt_tokens=(3, 40), max_tokens=(4, 20))
    with tempfile.TemporaryDirectory(prefix="dp-") as folder:  # short enough for the names of sockets
        async with small_cluster(Path(folder), Path(folder)) as cluster:
            target = Target(cluster.listener.url, ECHO, {who: {"x-tenant": who} for who in "ab"})
            answers = await burst(target, asks.take(12))
            left = await burst(target, leaving(asks.take(12), seed=3), over_s=0.1)
            await cluster.at_rest()
    assert [answer.failure for answer in (*answers, *left)] == [""] * 24
    assert all(answer.is_whole for answer in answers)
    assert sum((answer.verdict for answer in (*answers, *left)), Verdict()) == Verdict()
    assert all(len(answer.times) == len(answer.ask.expected) for answer in answers)
    assert all(answer.engines and answer.moves == 0 for answer in answers)
