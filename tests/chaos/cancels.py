"""A storm of clients that leave at random moments; afterwards the pools must hold exactly nothing."""

from __future__ import annotations

import asyncio
import random

from drive import Stage, leaving, probe
from load import Answer, Ask, send
from rig import RigError
from tally import Tally

AT_ONCE = 48  # requests in work


def run_cancels(stage: Stage, *, number: int, seed: int) -> Tally:
    """So many requests are left by their clients, AT_ONCE at a time, one in ten with several prompts or answers; one
    in eight more is not left, and must be right.
    """
    tally = Tally("cancel-storm", ("F26", "F27", "F28", "R10"), "any", f"{number} clients leave at random moments")
    tally.wanted_deaths = 0
    broad = number // 10
    asks = leaving([*stage.asks.take(number - broad), *(stage.asks.broad() for _ in range(broad))], seed)
    asks += [*stage.asks.take(number // 8 - number // 80), *(stage.asks.broad() for _ in range(number // 80))]
    answers = asyncio.run(_storm(stage, asks, seed))
    tally.add(answers)
    several = sum(answer.ask.num_choices > 1 for answer in answers)
    tally.notes.append(f"{tally.left} left before the end; {several} had several prompts or answers")
    stage.settle(tally)
    try:
        probe(stage, tally)
    except RigError as exc:
        tally.problems.append(str(exc))
    return tally


async def _storm(stage: Stage, asks: list[Ask], seed: int) -> list[Answer]:
    places = asyncio.Semaphore(AT_ONCE)
    order = random.Random(seed).sample(asks, len(asks))

    async def one(ask: Ask) -> Answer:
        async with places:
            return await send(stage.target, ask)

    return await asyncio.gather(*(one(ask) for ask in order))
