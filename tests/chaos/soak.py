"""Engines of one pool are killed again and again under a steady load; what others notice of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from drive import Stage, note_deaths, probe, watch_until_known
from load import Answer, steady
from rig import RigError
from tally import Tally, p99
from watch import Watch

NEAR_S = 3.0  # a gap this soon after a death counts as under its influence
MAX_RATIO = 1.5


def run_soak(stage: Stage, *, role: str, for_s: float, every_s: float, rate: float, seed: int) -> Tally:
    """`rate` requests a second for so long; every `every_s` one engine of the pool `role` is killed, in turns."""
    model = stage.rig.kind
    tally = Tally(f"soak-{role}-{model}", ("R01" if role == "decode" else "R02",), "any")
    tally.what = f"kill -9 {role} every {every_s:g} s for {for_s:g} s, {rate:g} requests/s, {model}"
    watch = Watch(stage.rig)
    killed = 0

    async def kill() -> None:
        nonlocal killed
        began, turn = time.monotonic(), 0
        while (due := began + (turn + 0.5) * every_s) < began + for_s:
            await asyncio.sleep(due - time.monotonic())
            try:
                present = sorted(e.name for e in await asyncio.to_thread(stage.rig.engines) if role in e.role)
                await asyncio.to_thread(stage.rig.kill, present[turn % len(present)])
                killed += 1
            except (RigError, ZeroDivisionError, ProcessLookupError) as exc:
                tally.notes.append(f"nothing to kill at turn {turn}: {exc}")
            turn += 1

    async def both() -> list[Answer]:
        async with asyncio.TaskGroup() as group:
            group.create_task(kill())
            load = group.create_task(steady(stage.target, stage.asks, rate=rate, for_s=for_s, seed=seed))
        return load.result()

    try:
        answers = asyncio.run(both())
    finally:
        watch_until_known(watch)
    tally.add(answers)
    tally.wanted_deaths = killed
    stage.settle(tally)
    try:
        note_deaths(tally, watch, answers)
        probe(stage, tally)
    except RigError as exc:
        tally.problems.append(str(exc))
    _compare(tally, answers, [death.at for death in watch.deaths])
    return tally


def _compare(tally: Tally, answers: list[Answer], deaths: Sequence[float]) -> None:
    near, far = gaps(answers, deaths)
    calm, shaken = p99(far), p99(near)
    if calm is None or shaken is None:
        return
    ratio = shaken / calm
    tally.notes.append(
        f"inter-token p99 of streams that were not moved: {1e3 * calm:.1f} ms, within {NEAR_S:g} s after a death "
        f"{1e3 * shaken:.1f} ms: {ratio:.2f} times ({len(near)} and {len(far)} gaps)"
    )
    if ratio > MAX_RATIO:
        tally.problems.append(f"other streams' inter-token p99 grew {ratio:.2f} times, promised {MAX_RATIO:g}")


def gaps(answers: Sequence[Answer], deaths: Sequence[float]) -> tuple[list[float], list[float]]:
    """Times between tokens of streams that stayed where they were: within NEAR_S after a death, and all others."""
    near: list[float] = []
    far: list[float] = []
    for answer in answers:
        if not answer.is_whole or answer.moves:
            continue
        for at, gap in answer.gaps():
            if gap > 0:  # tokens of one event came together
                (near if any(0 <= at - death <= NEAR_S for death in deaths) else far).append(gap)
    return near, far
