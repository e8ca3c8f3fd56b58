"""Notices an engine process that lives and says nothing: one that was stopped, or whose threads hang."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

PERIOD_S = 0.5
# A busy machine makes a healthy process slow to answer, and killing it makes the machine busier. A stopped process
# is known as such by the kernel and does not get this patience.
SLOW_FACTOR = 6


class Watched(Protocol):
    """The part of an engine process that is watched."""

    async def ping(self) -> bool:
        """True: it was asked to end (SIGTERM). Raises EngineLost when the process is gone."""

    def is_stopped(self) -> bool:
        """Whether the kernel holds the process stopped."""


async def watch(process: Watched, *, silence_s: float, on_asked: Callable[[], None]) -> str:
    """Returns when the process has not answered for `silence_s`, or SLOW_FACTOR times that where it is not stopped:
    what is wrong, in words. `on_asked` is called once, when it says that it was asked to end. Raises EngineLost.

    Silence is counted in turns of this loop, not by a clock: a watcher that got no time itself accuses nobody.
    """
    loop, turn_s = asyncio.get_running_loop(), min(PERIOD_S, silence_s)
    was_asked = False
    while True:
        pending = asyncio.ensure_future(process.ping())
        silent_s = 0.0
        try:
            while True:
                began = loop.time()
                done, _ = await asyncio.wait({pending}, timeout=turn_s)
                if done:
                    break
                silent_s += min(loop.time() - began, turn_s)
                if silent_s >= silence_s and process.is_stopped():
                    return f"its process was stopped and did not answer for {silent_s:g} s"
                if silent_s >= silence_s * SLOW_FACTOR:
                    return f"it hung: no answer for {silent_s:g} s"
            if pending.result() and not was_asked:
                was_asked = True
                on_asked()
        finally:
            pending.cancel()
        await asyncio.sleep(turn_s)


async def watch_held(process: Watched, *, silence_s: float) -> str:
    """Returns when the kernel has held the process stopped for `silence_s`, in turns of this loop: what is wrong, in
    words. For a process that loads, and may answer nothing for a while.
    """
    loop, turn_s, held_s = asyncio.get_running_loop(), min(PERIOD_S, silence_s), 0.0
    while held_s < silence_s:
        began = loop.time()
        await asyncio.sleep(turn_s)
        held_s = held_s + min(loop.time() - began, turn_s) if process.is_stopped() else 0.0
    return f"its process was stopped for {held_s:g} s"
