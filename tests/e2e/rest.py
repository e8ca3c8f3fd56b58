"""When is an engine at rest? Once nothing runs, waits, is transferred, staged or held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from diptych.cluster.engine.engine import Engine
from diptych.protos.status import EngineStatus

REST_S = 35.0  # longer than a lease: a slot that is in quarantine may need it
NEWS_S = 5.0  # for the end of a transfer to reach the loop; a block that only a lease's end would free is a leak


def held_in(reading: EngineStatus) -> str:
    """What an engine has in hand; empty when it is at rest."""
    held = {
        "running": reading.running,
        "waiting": reading.waiting,
        "transfers": reading.transfers,
        "slots": reading.ring_slots_busy,
        "blocks": reading.blocks.used,
    }
    return ", ".join(f"{count} {what}" for what, count in held.items() if count)


async def at_rest(engines: Iterable[Engine], within_s: float = REST_S) -> list[EngineStatus]:
    """A reading of each once all are at rest. AssertionError with what is left: somebody works or a slot is busy after
    `within_s`, or blocks are held NEWS_S after that was over.

    A transfer that has ended gives its blocks back when the engine's loop hears of it, a moment later: one reading that
    shows no transfer may still show their blocks.
    """
    engines, deadline = list(engines), time.monotonic() + within_s
    is_idle = False
    while True:
        readings = [engine.status() for engine in engines]
        held = [held_in(reading) for reading in readings]
        if not any(held):
            return readings
        works = any(r.running or r.waiting or r.transfers or r.ring_slots_busy for r in readings)
        if not works and not is_idle:
            is_idle, deadline = True, min(deadline, time.monotonic() + NEWS_S)
        assert time.monotonic() < deadline, f"held although nothing should be, engine by engine: {held}"
        await asyncio.sleep(0.01)
