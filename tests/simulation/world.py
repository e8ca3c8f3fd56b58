"""A whole cluster in one thread and no time: `run(seed)` and what came of it.

Router, placement, workers, pools, transfer machines and manager are the real ones. The seed decides everything else:
requests, travel times, copies, faults. The same seed gives the same run, to the last message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import faults
import invariants
from clients import Client, draw, serve
from engine import SimEngine
from invariants import SETTLE_S, Violation
from loop import NothingToDo, SimLoop
from members import Members
from network import Network
from session import SimSession

from diptych.cluster.config import LimitSettings, RouterSettings
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.cluster.router.incident import Incident
from diptych.cluster.router.router import Router
from diptych.protos.types import EngineRef, Role

IDLE_S = 60.0  # nobody gets anything for so long although somebody waits: no_progress
LOOK_EVERY = 16  # turns of an engine between two looks at its books
FELLED = ((Role.PREFILL, Role.DECODE), (Role.DECODE,))  # whom poison fells
TEAM = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}


@dataclass(slots=True)
class Outcome:
    """What a seed's run came to. No violation: all held."""

    seed: int
    trace: str
    violation: Violation | None
    outcomes: Counter[str]
    counters: Counter[str]
    virtual_s: float
    log: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Poison:
    """What a poisonous request does, to engines of which roles; drawn for every run, met in few."""

    roles: frozenset[Role]
    kills: bool
    num_felled: int = 0


class World:
    """One run. `note` is the trace; `violated` ends the run."""

    def __init__(self, seed: int, *, keep_log: bool = False, depth: int | None = None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.poison = Poison(frozenset(self.rng.choice(FELLED)), self.rng.random() < 0.5)
        self.loop = SimLoop()
        self.network = Network(self.loop, self.rng)
        self.violation: Violation | None = None
        self.counters: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.log: list[str] = []
        self.convicted: set[tuple[tuple[int, ...], int, bool]] = set()  # what may be quarantined: prompt, length, stop
        self.router: Router
        self.members: Members
        self._keep_log = keep_log
        self._depth = depth
        self._hash = hashlib.blake2b(digest_size=16)
        self._main: asyncio.Task[None] | None = None
        self._progress_at = 0.0
        self._waiting = 0
        self._flips = 0
        self._struck: dict[str, list[tuple[EngineRef | None, bool]]] = {}
        self._refusals_before = 0.0
        self._turns = 0

    # ---- what happens ---------------------------------------------------------------------------

    def note(self, engine: SimEngine | None, what: str, key: object, detail: object) -> None:
        """One line of the trace."""
        name = "-" if engine is None else engine.name
        line = f"{self.loop.time():.9f} {name} {what} {key} {detail}\n"
        self._hash.update(line.encode())
        if self._keep_log:
            self.log.append(line)

    def violated(self, violation: Violation) -> None:
        """The first one counts; the run is over."""
        if self.violation is None:
            self.violation = violation
            self.note(None, "violation", None, violation)
            if self._main is not None:
                self._main.cancel()

    def failed(self, engine: SimEngine, exc: Exception) -> None:
        """The product raised where it must not."""
        where = "".join(traceback.format_exception(exc)[-3:])
        self.violated(Violation("defect", f"{engine.name}: {where}"))

    def progress(self, client: Client) -> None:
        """Somebody got a token."""
        self._progress_at = self.loop.time()

    def ended(self, client: Client) -> None:
        """Somebody's call is over."""
        self._waiting -= 1
        self._progress_at = self.loop.time()
        if not client.outcome:
            self.violated(Violation("i7", f"{client.name} has no end"))
        self.outcomes[client.outcome] += 1

    def struck(self, name: str, engine: EngineRef | None, incident: Incident | None) -> None:
        """A call lost an engine, or a step that it was in raised."""
        self._struck.setdefault(name, []).append((engine, incident is None))

    def strikes_of(self, name: str) -> tuple[int, int, int]:
        """What a call has suffered: engines that did die, steps that raised, streams that an engine gave up."""
        struck = self._struck.get(name, [])
        dead = {ref for ref, is_odd in struck if ref is not None and not is_odd and self.is_dead(ref)}
        return len(dead), sum(ref is None for ref, _ in struck), sum(is_odd for _, is_odd in struck)

    def false_losses(self, name: str) -> int:
        """How often a call was struck by the loss of an engine that lived on."""
        return sum(
            ref is not None and not is_odd and not self.is_dead(ref) for ref, is_odd in self._struck.get(name, [])
        )

    def is_dead(self, ref: EngineRef) -> bool:
        """Whether that life is over, or the manager says so."""
        engine = self.life(ref)
        return engine is None or not engine.is_alive or ref in self.members.given_up

    @property
    def is_hopeless(self) -> bool:
        """Whether the router may give up what it has begun: nobody hears it any more, or its budget is used up."""
        return self.network.is_silent or self._refusals() > self._refusals_before

    def _refusals(self) -> float:
        counter = self.router.metrics.counters["retry_budget_refused"]
        return sum(
            sample.value for family in counter.collect() for sample in family.samples if sample.name.endswith("_total")
        )

    def flipped(self, data: bytes) -> bytes:
        """What lies in a slot: not always what was put there."""
        if not self._flips:
            return data
        self._flips -= 1
        self.counters["flips"] += 1
        at = self.rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << self.rng.randrange(8)]) + data[at + 1 :]

    def flip(self, count: int) -> None:
        """The next `count` chunks are staged with a wrong bit."""
        self._flips += count

    def life(self, ref: EngineRef) -> SimEngine | None:
        """The process of that life, dead ones included."""
        return self.members.lives.get(ref)

    def depth_of(self, ref: EngineRef) -> int:
        """Of that engine's runner. Drawn apart: a run of one depth is what it was when there was no other."""
        if self._depth is not None:
            return self._depth
        return random.Random(f"{self.seed} {ref.engine_id} {ref.epoch}").choice((1, 2))

    def look(self, engine: SimEngine) -> None:
        """I1 and I2, often."""
        self._turns += 1
        if self.seed % 16 == 0 or self._turns % LOOK_EVERY == 0:
            invariants.i1_i2(engine)

    # ---- the run --------------------------------------------------------------------------------

    def run(self, requests: int, num_faults: int) -> Outcome:
        """See `run`."""
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(self._raised)
        try:
            self._main = self.loop.create_task(self._live(requests, num_faults))
            with contextlib.suppress(asyncio.CancelledError):
                self.loop.run_until_complete(self._main)
        except NothingToDo:
            self.violated(Violation("no_progress", "everybody waits and no timer runs"))
        except Violation as wrong:
            self.violated(wrong)
        finally:
            self._close()
        return Outcome(
            self.seed,
            self._hash.hexdigest(),
            self.violation,
            self.outcomes,
            self.counters,
            self.loop.time(),
            self.log,
        )

    async def _live(self, requests: int, num_faults: int) -> None:
        limits = LimitSettings(max_running=32, max_waiting=64)
        self.members = Members(self)
        self.router = Router(
            directory=self.members,
            settings=RouterSettings(limits=limits),
            metrics=_metrics(),
            clock=self.loop.time,
            rng=self.rng,
            connect=partial(SimSession, self),  # type: ignore[arg-type]
            is_strict=True,
        )
        self._refusals_before = self._refusals()
        for name, role in TEAM.items():
            self.members.launch(name, frozenset({role}), 0.0)
        await asyncio.sleep(0.001)
        await self.router.start()
        await asyncio.sleep(0.1)
        span_s = self.rng.choice((0.3, 1.0, 2.0))
        clients = draw(self.rng, requests, span_s)
        last = faults.plan(self, num_faults, span_s)
        if self.seed % 4 == 3:  # I5 from any state: nobody hears anybody from here on
            self.loop.call_later(self.rng.uniform(0.2, span_s + 0.2), self.network.silence)
        self._waiting = sum(1 + len(client.siblings) for client in clients)
        tasks = [asyncio.ensure_future(serve(self, client)) for client in clients]
        await self._finish(tasks)
        await asyncio.sleep(max(last - self.loop.time(), 0))
        await self._settle()

    async def _finish(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for all clients, as long as one of them gets something now and then."""
        self._progress_at = self.loop.time()
        pending: set[asyncio.Task[None]] = set(tasks)
        while pending:
            _, pending = await asyncio.wait(pending, timeout=5.0, return_when=asyncio.ALL_COMPLETED)
            if pending and self.loop.time() - self._progress_at > IDLE_S:
                raise Violation("no_progress", f"{self._waiting} calls get nothing for {IDLE_S:g} s")
        for task in tasks:
            task.result()

    async def _settle(self) -> None:
        """No messages any more: what is left must come down by itself."""
        self.members.close()
        for engine in self.members.lives.values():
            engine.resume()
        self.network.silence()
        await self.router.stop()
        living = [engine for engine in self.members.lives.values() if engine.is_alive]
        for _ in range(SETTLE_S):
            if not any(map(invariants.holds, living)):
                break
            await asyncio.sleep(1.0)
        for engine in self.members.lives.values():
            if engine.is_alive:
                invariants.i1_i2(engine)
                self._named_blocks_hold_what_they_name(engine)
                invariants.i5(engine)
                self._count(engine)

    def _named_blocks_hold_what_they_name(self, engine: SimEngine) -> None:
        for prompt, salt in list(engine.pool.asked):
            engine.pool.open(prompt, salt, max_cached_tokens=len(prompt)).close()

    def _count(self, engine: SimEngine) -> None:
        for machine in (engine.sender, engine.receiver):
            if machine is not None:
                self.counters.update({name: int(count) for name, count in machine.counters.items() if count})

    def _raised(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        exc = context.get("exception")
        if isinstance(exc, Violation):
            self.violated(exc)
        elif exc is not None:
            self.violated(Violation("defect", "".join(traceback.format_exception(exc)[-3:])))

    def _close(self) -> None:
        left = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
        for task in left:
            task.cancel()
        with contextlib.suppress(NothingToDo):
            self.loop.run_until_complete(_gather(left))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        if hasattr(self, "members"):
            for engine in self.members.lives.values():
                if engine.ring is not None:
                    engine.ring.close()
        asyncio.set_event_loop(None)
        self.loop.close()


async def _gather(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


_KEPT: list[RouterMetrics] = []


def _metrics() -> RouterMetrics:
    """One registry for all runs of a process: it decides nothing and costs milliseconds to make."""
    if not _KEPT:
        _KEPT.append(RouterMetrics())
    return _KEPT[0]


def run(seed: int, *, requests: int = 50, faults: int = 3, keep_log: bool = False, depth: int | None = None) -> Outcome:
    """One seed's run of so many requests and at least so many faults. `depth`: of all runners; None: drawn for each."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return World(seed, keep_log=keep_log, depth=depth).run(requests, faults)
    finally:
        logging.disable(level)
