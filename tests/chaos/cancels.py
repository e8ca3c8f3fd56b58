"""A storm of clients that leave at random moments; afterwards the pools must hold exactly nothing."""

from __future__ import annotations

import asyncio

from drive import Stage, leaving, probe
from load import Answer, Ask, send
from rig import RigError
from tally import Tally

AT_ONCE = 48  # requests in work


def run_cancels(stage: Stage, *, number: int, seed: int) -> Tally:
    """So many requests are left by their clients, AT_ONCE at a time; one in eight is not, and must be right."""
    tally = Tally("cancel-storm", ("F26", "F27", "F28", "R10"), "any", f"{number} clients leave at random moments")
    tally.wanted_deaths = 0
    asks = leaving(stage.asks.take(number), seed)
    asks += stage.asks.take(number // 8)
    answers = asyncio.run(_storm(stage, asks))
    tally.add(answers)
    stage.settle(tally)
    try:
        probe(stage, tally)
    except RigError as exc:
        tally.problems.append(str(exc))
    return tally


async def _storm(stage: Stage, asks: list[Ask]) -> list[Answer]:
    places = asyncio.Semaphore(AT_ONCE)
    # Those that stay are spread among those that leave.
    order = [ask for pair in zip(asks[::2], asks[1::2][::-1], strict=False) for ask in pair]

    async def one(ask: Ask) -> Answer:
        async with places:
            return await send(stage.target, ask)

    return await asyncio.gather(*(one(ask) for ask in order))
