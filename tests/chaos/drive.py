"""Runs one cell of the matrix on a running cluster: load, fault, and what must be true afterwards."""

from __future__ import annotations

import asyncio
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from cells import OF_A_MODEL, Act, Cell
from load import Answer, Ask, Asks, Target, burst
from rig import Leak, Reading, Rig, RigError, await_engines
from tally import Tally
from watch import Watch

BACK_S = 90.0  # a dead engine is replaced within so long, or the cell says so
QUIET_S = 35.0  # the leak law: the lease of 30 s and 5 more
STOOD_STILL_S = 0.3  # a watcher that was this late cannot blame others for being late
ACTING_S = 240.0  # a command such as a rolling restart may take so long
AGAIN = 5  # rounds at the most that are made again
PROBES = 5  # normal requests after every cell
TOLD = ("kv_fenced_messages_total", "kv_checksum_failures_total", "kv_torn_reads_total", "kv_lease_expired_total",
        "kv_thread_faults_total", "kv_transfer_failures_total", "decode_local_prefills_total")  # fmt: skip
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


@dataclass
class Stage:
    """A cluster, who asks it, and what is normal there."""

    rig: Rig
    asks: Asks
    engines: int = 4
    before: Reading | None = None

    @property
    def target(self) -> Target:
        """Where the requests go."""
        headers = {who: self.rig.headers(who) for who in ("a", "b")}
        return Target(self.rig.url, self.rig.model, headers, self.rig.kind == "echo")

    def settle(self, tally: Tally) -> None:
        """Wait until every engine is there and nothing is held; what does not come is written into the tally."""
        try:
            tally.back_s = await_engines(self.rig, self.engines, BACK_S)
        except RigError as exc:
            tally.problems.append(f"engines do not come back: {exc}")
        began = time.monotonic()
        try:
            self.rig.quiet(QUIET_S, self.before)
        except Leak as exc:
            tally.leaked += str(exc).split("; ")
        except RigError as exc:
            tally.problems.append(str(exc))
        tally.quiet_s = time.monotonic() - began


class Trigger:
    """Does each act of a cell once, in their order, when a stream has as many tokens as the act waits for."""

    def __init__(self, rig: Rig, acts: tuple[Act, ...]) -> None:
        self.problems: list[str] = []
        self._rig = rig
        self._left = list(acts)
        self._doing: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, answer: Answer | None) -> None:
        """After tokens came; None: the first request was sent."""
        number = len(answer.tokens) if answer else 0
        for act in [act for act in self._left if act.after_tokens <= number]:
            self._left.remove(act)
            self._doing.append(self._thread.submit(self._do, act))

    @property
    def is_done(self) -> bool:
        """Whether every act came and is over."""
        return not self._left and all(doing.done() for doing in self._doing)

    def join(self) -> None:
        """Wait for the acts; those that never came are problems."""
        self._thread.shutdown()
        self.problems += [f"never came to {act.verb} {act.target}" for act in self._left]

    def _do(self, act: Act) -> None:
        try:
            if act.verb == "stop":
                self._rig.stop_continue(act.target, act.for_s)
            elif act.verb in _SIGNALS:
                self._rig.kill(act.target, _SIGNALS[act.verb])
            else:
                models = [self._rig.model] if act.verb in OF_A_MODEL else []
                self._rig.command(act.verb, *models, *shlex.split(act.target))
        except (RigError, OSError, subprocess.SubprocessError) as exc:
            self.problems.append(f"{act.verb} {act.target}: {exc}")


def aimed(cell: Cell, rig: Rig) -> Cell:
    """The cell with the names of engines that are there now: those of a pool's first ones may have changed."""
    names = {}
    for role in ("prefill", "decode"):
        present = sorted(engine.name for engine in rig.engines() if role in engine.role)
        names |= {f"{role}-{place}": name for place, name in enumerate(present)}

    def meant(target: str) -> str:
        return " ".join(names.get(word, word) for word in target.split(" "))

    rules = tuple({**rule, "engine": names.get(rule["engine"], rule["engine"])} if "engine" in rule else rule
                  for rule in cell.rules)  # fmt: skip
    return replace(cell, rules=rules, acts=tuple(replace(a, target=meant(a.target)) for a in cell.acts))


def run_rounds(stage: Stage, cell: Cell, *, seed: int) -> Tally:
    """The cell as often as it wants, each time with its own number of requests.

    A round may miss its fault, as no request came to the engine at the point that kills it: it is made again.
    """
    total = run_cell(stage, cell, requests=cell.each, seed=seed)
    turn = 1
    while turn < cell.rounds or (total.lacks_deaths and turn < cell.rounds + AGAIN):
        tally = run_cell(stage, cell, requests=cell.each, seed=seed + 1_000 * turn)
        total.absorb(tally if turn < cell.rounds else replace(tally, wanted_deaths=0))
        turn += 1
    total.what += f", {turn} times with {cell.each} requests"
    return total


def run_cell(stage: Stage, cell: Cell, *, requests: int, seed: int, at_least: int = 0) -> Tally:
    """The cell's requests under its fault, then the leak law and a few normal requests.

    With `keep_on` requests come until the acts are over and there were `at_least` so many.
    """
    tally = Tally(cell.id, cell.covers, cell.phase, cell.what, may_break=cell.may_break, wanted_deaths=cell.deaths)
    rig = stage.rig
    cell = aimed(cell, rig)
    counted = rig.counters()
    watch = Watch(rig)
    trigger = Trigger(rig, cell.acts)
    try:
        if cell.rules:
            rig.faults(cell.rules, seed)
        answers = asyncio.run(_requests(stage, cell, trigger, requests=requests, seed=seed, at_least=at_least))
        trigger.join()
        if cell.rules:
            rig.faults([])
    finally:
        watch_until_known(watch)
    tally.problems += trigger.problems
    tally.add(answers)
    stage.settle(tally)
    try:
        note_deaths(tally, watch, answers)
        now = rig.counters()
        tally.counters = {name: more for name in TOLD if (more := now.get(name, 0) - counted.get(name, 0)) > 0}
        fired = sum(
            more for name in now if name.startswith("fault_") and (more := now[name] - counted.get(name, 0)) > 0
        )
        if _is_counted(cell) and not fired:
            tally.problems.append("its fault never happened: this cell has tested nothing")
        elif fired:
            tally.counters["faults"] = fired
        probe(stage, tally)
    except RigError as exc:
        tally.problems.append(str(exc))
    return tally


def _is_counted(cell: Cell) -> bool:
    """Whether engines that live on have counted the cell's faults. Routers show no counters, the dead none either."""
    return any(
        rule["action"] not in ("kill", "stop") and rule["point"].startswith(("hinge.", "engine.", "session.status"))
        for rule in cell.rules
    )


def watch_until_known(watch: Watch) -> None:
    """A death in the last moment is to be known to the router too."""
    time.sleep(0.5)
    watch.close()


def note_deaths(tally: Tally, watch: Watch, answers: list[Answer]) -> None:
    """Deaths, their detection, and how long the streams of that moment had to wait."""
    losses = watch.losses()
    detection, missing = watch.detection(losses)
    if watch.stood_still_s > STOOD_STILL_S:
        tally.notes.append(f"the whole machine, this program too, stood still for {watch.stood_still_s:.2f} s")
    if tally.wanted_deaths is None:
        return  # engines were told to end: that is no death
    tally.notes += [f"given up although it lived: {loss}" for loss in watch.untrue(losses)]
    tally.deaths += len(watch.deaths)
    tally.detection += detection
    if not tally.may_break:
        tally.undetected += len(missing)
    for death in watch.deaths:
        tally.silence += [s for answer in answers if (s := answer.silence_after(death.at)) is not None]


def probe(stage: Stage, tally: Tally) -> None:
    """Normal requests, which nothing disturbs: they must all be right. A failed one is a problem of the cell."""
    answers = asyncio.run(burst(stage.target, stage.asks.take(PROBES)))
    for answer in answers:
        tally.verdict += answer.verdict
        if not answer.is_whole:
            tally.problems.append(f"a normal request afterwards failed: {answer.failure}")


async def _requests(
    stage: Stage, cell: Cell, trigger: Trigger, *, requests: int, seed: int, at_least: int
) -> list[Answer]:
    asks = stage.asks.take(requests)
    if cell.leave:
        asks = leaving(asks, seed)
    trigger(None)
    answers = await burst(stage.target, asks, over_s=cell.over_s, on_token=trigger)
    deadline = time.monotonic() + ACTING_S
    while cell.keep_on and time.monotonic() < deadline and not (trigger.is_done and len(answers) >= at_least):
        answers += await burst(stage.target, stage.asks.take(requests), over_s=2.0, on_token=trigger)
    return answers


def leaving(asks: list[Ask], seed: int) -> list[Ask]:
    """Each of them goes away: a half after some tokens, a half after some time, from at once to about its end."""
    dice = random.Random(seed)
    choices: list[Callable[[Ask], Ask]] = [
        lambda ask: replace(ask, leave_after=dice.randint(1, max(1, len(ask.expected) - 1))),
        lambda ask: replace(ask, leave_after_s=dice.uniform(0.001, 1.0)),
    ]
    return [dice.choice(choices)(ask) for ask in asks]
