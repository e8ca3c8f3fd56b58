"""When is an engine at rest? Once nothing runs, waits, is transferred, staged or held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from diptych.cluster.engine.engine import Engine
from diptych.protos.status import EngineStatus

RELEASE_S = 35.0  # longer than a lease


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


async def at_rest(engines: Iterable[Engine]) -> list[EngineStatus]:
    """A reading of each once all are at rest. AssertionError with what is left after RELEASE_S: something leaks.

    A transfer that has ended gives its blocks back when the engine's loop hears of it, a moment later: one reading that
    shows no transfer may still show their blocks.
    """
    engines, deadline = list(engines), time.monotonic() + RELEASE_S
    while True:
        readings = [engine.status() for engine in engines]
        held = [held_in(reading) for reading in readings]
        if not any(held):
            return readings
        assert time.monotonic() < deadline, f"held after {RELEASE_S:g} s, engine by engine: {held}"
        await asyncio.sleep(0.01)
