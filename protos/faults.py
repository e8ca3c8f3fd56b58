"""The fault plan: where, when and how a process is to fail, so that recovery can be tried on the real thing.

A plan does nothing by itself. What crosses an edge asks `at(point, peer, message)` and does to itself what it is told;
STOP and KILL alone happen here. Without rules there is no plan (`plan_of` gives None) and nobody wraps anything.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, overload

from pydantic import Field, ValidationError, field_validator, model_validator

from .errors import DiptychError, EngineFault, EngineLost, TransferError
from .settings import Seconds, Settings

FILE_PERIOD_S = 0.25  # how often a plan's file is looked at

log = logging.getLogger(__name__)


class Point(StrEnum):
    """An edge where something can go wrong."""

    HINGE_DIAL = "hinge.dial"
    HINGE_OUT = "hinge.out"  # control messages of the hinge, leaving this process
    HINGE_IN = "hinge.in"  # the same, arriving
    HINGE_GATHER = "hinge.gather"
    HINGE_PUBLISH = "hinge.publish"  # a slot's bytes, after their checksum was taken
    HINGE_FETCH = "hinge.fetch"
    HINGE_SCATTER = "hinge.scatter"
    HINGE_DELIVER = "hinge.deliver"  # news of a transfer to the step thread
    SESSION_OPEN = "session.open"
    SESSION_SUBMIT = "session.submit"  # router to engine
    SESSION_CANCEL = "session.cancel"
    SESSION_TOKENS = "session.tokens"  # engine to router
    SESSION_STATUS = "session.status"
    ENGINE_STEP = "engine.step"
    ENGINE_START = "engine.start"
    ENGINE_DRAIN = "engine.drain"
    MANAGER_REPORT = "manager.report"
    MANAGER_LIST = "manager.list"
    ROUTER_PLACE = "router.place"


class Action(StrEnum):
    """What happens there."""

    DROP = "drop"  # it does not happen, and who asked for it sees success
    DELAY = "delay"  # it happens after delay_s
    DUPLICATE = "duplicate"  # it happens twice
    REORDER = "reorder"  # it waits for the next one of its point, delay_s at most
    CORRUPT = "corrupt"  # one bit of its bytes is turned
    TRUNCATE = "truncate"  # its bytes end early
    RAISE = "raise"  # it fails with `injected(point)`
    STOP = "stop"  # this process is stopped; for_s later it continues (0: it does not)
    KILL = "kill"  # this process ends at once


_ENDINGS = frozenset({Action.STOP, Action.KILL})
_ALWAYS = _ENDINGS | {Action.RAISE}
_TIMED = _ALWAYS | {Action.DELAY}
_MESSAGE = _TIMED | {Action.DROP, Action.DUPLICATE, Action.REORDER}
_BYTES = frozenset({Action.CORRUPT, Action.TRUNCATE})
POSSIBLE: dict[Point, frozenset[Action]] = {
    Point.HINGE_DIAL: _TIMED,
    Point.HINGE_OUT: _MESSAGE,
    Point.HINGE_IN: _MESSAGE,
    Point.HINGE_GATHER: _ALWAYS,
    Point.HINGE_PUBLISH: _ALWAYS | _BYTES,
    Point.HINGE_FETCH: _TIMED | _BYTES,
    Point.HINGE_SCATTER: _ALWAYS,
    Point.HINGE_DELIVER: _TIMED - {Action.RAISE},
    Point.SESSION_OPEN: _TIMED,
    Point.SESSION_SUBMIT: _MESSAGE,
    Point.SESSION_CANCEL: _MESSAGE,
    Point.SESSION_TOKENS: _MESSAGE | {Action.TRUNCATE},
    Point.SESSION_STATUS: _MESSAGE,
    Point.ENGINE_STEP: _TIMED,
    Point.ENGINE_START: _TIMED,
    Point.ENGINE_DRAIN: _TIMED,
    Point.MANAGER_REPORT: _TIMED,
    Point.MANAGER_LIST: _TIMED,
    Point.ROUTER_PLACE: _TIMED,
}
"""What can happen where: bytes can be altered only where there are some, and a step cannot be left out."""

_MESSAGES = frozenset({Point.HINGE_OUT, Point.HINGE_IN, Point.HINGE_FETCH, Point.MANAGER_REPORT})
_HAS_PEER = _MESSAGES | {point for point in Point if point.startswith("session.")} | {Point.HINGE_DIAL}
_HAS_MESSAGE = _MESSAGES | {Point.HINGE_DELIVER, Point.ENGINE_STEP, Point.MANAGER_LIST}
_IN_ROUTER = frozenset(
    {Point.SESSION_OPEN, Point.SESSION_SUBMIT, Point.SESSION_CANCEL, Point.MANAGER_LIST, Point.ROUTER_PLACE}
)
_OTHERS = ("router", "manager")  # processes that are no engines, by the name that a rule gives them


class FaultRule(Settings):
    """One fault: where, what, and for which of the occasions there. Occasions are counted per rule, from 1."""

    point: Point = Field(description="where")
    action: Action = Field(description="what happens")
    peer: str = Field("*", description="pattern of the engine at the other end")
    engine: str = Field("*", description="pattern of the process that fails: an engine's id, router or manager")
    message: str = Field("*", description="pattern of the message's kind, where there are kinds")
    nth: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="the occasions that fail, counted from 1")
    probability: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="that an occasion fails, instead of nth"
    )
    limit: int | None = Field(None, ge=1, description="at most so often; null: without end")
    delay_s: Seconds = Field(0.05, description="delay, and the longest wait of reorder")
    for_s: float = Field(0.0, ge=0, allow_inf_nan=False, description="stop: time until it continues; 0: never")

    @model_validator(mode="after")
    def _can_happen(self) -> FaultRule:
        if self.action not in POSSIBLE[self.point]:
            known = ", ".join(sorted(POSSIBLE[self.point]))
            raise ValueError(f"{self.action} cannot happen at {self.point}; what can: {known}")
        if bool(self.nth) == bool(self.probability):
            raise ValueError("a fault needs nth or a probability, and not both")
        if self.for_s and self.action is not Action.STOP:
            raise ValueError("for_s is of stop alone")
        return self

    @model_validator(mode="after")
    def _can_be_met(self) -> FaultRule:
        """A rule that never fires would make a test of recovery pass for nothing."""
        if self.peer != "*" and self.point not in _HAS_PEER:
            raise ValueError(f"{self.point} knows no peer")
        if self.message != "*" and self.point not in _HAS_MESSAGE:
            raise ValueError(f"{self.point} knows no kinds of message")
        where = "router" if self.point in _IN_ROUTER else "manager" if self.point is Point.MANAGER_REPORT else None
        if where is not None and not fnmatchcase(where, self.engine):
            raise ValueError(f"{self.point} is in the process named {where}, which {self.engine} does not mean")
        if where is None and self.engine in _OTHERS:
            raise ValueError(f"{self.point} is in engines, not in the {self.engine}")
        return self


class FaultSettings(Settings):
    """Faults to inject, for tests of recovery alone; without rules and file nothing is injected."""

    rules: tuple[FaultRule, ...] = Field((), description="what fails, where and when; see concepts/recovery.md")
    seed: int = Field(0, ge=0, description="of the probabilities; one seed gives one run")
    file: Path | None = Field(
        None,
        description="JSON with rules and seed that replace these, read again whenever it changes; stop and kill in it "
        "are for processes that live when it is written, not for those that take their place",
    )

    @field_validator("file")
    @classmethod
    def _absolute(cls, file: Path | None) -> Path | None:
        return None if file is None else Path(os.path.abspath(file.expanduser()))

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be injected."""
        return not self.rules and self.file is None


@dataclass(frozen=True, slots=True)
class Fault:
    """One order to fail. `delay_s` and `for_s` in seconds; `draw` in [0, 1): a seeded number, such as which bit."""

    action: Action
    delay_s: float = 0.05
    for_s: float = 0.0
    draw: float = 0.0


def _act(fault: Fault) -> None:
    """Stop or kill this process."""
    if fault.action is Action.STOP and fault.for_s:
        # The shell ends at once, so that nobody has to wait for it; what it left wakes this process.
        wake = f"(sleep {fault.for_s}; kill -CONT {os.getpid()}) >/dev/null 2>&1 </dev/null &"
        subprocess.run(["/bin/sh", "-c", wake], check=True)
    os.kill(os.getpid(), signal.SIGSTOP if fault.action is Action.STOP else signal.SIGKILL)


class _Armed:
    """A rule with its count of occasions and its own random numbers, which other rules do not move."""

    def __init__(self, rule: FaultRule, seed: str) -> None:
        self.rule = rule
        self._random = random.Random(seed)
        self._occasions = 0
        self._fired = 0

    def meets(self, peer: str, message: str) -> bool:
        return fnmatchcase(peer, self.rule.peer) and fnmatchcase(message, self.rule.message)

    def fire(self) -> Fault | None:
        """Count one occasion; the fault, if this one fails."""
        rule = self.rule
        self._occasions += 1
        chosen = self._occasions in rule.nth if rule.nth else self._random.random() < rule.probability
        if not chosen or (rule.limit is not None and self._fired >= rule.limit):
            return None
        self._fired += 1
        return Fault(rule.action, rule.delay_s, rule.for_s, self._random.random())


class FaultPlan:
    """The faults of one process, `me`: an engine's id, "router" or "manager". May be asked from any thread."""

    def __init__(self, settings: FaultSettings, *, me: str, act: Callable[[Fault], None] = _act) -> None:
        self.counts: Counter[str] = Counter()  # "hinge.out/drop" -> how often it happened
        self._me = me
        self._act = act
        self._lock = threading.Lock()
        self._armed: dict[Point, list[_Armed]] = {}
        self._file = settings.file
        self._read_ns = 0  # mtime of what was read of the file
        self._closed = threading.Event()
        self._arm(settings)
        if self._file is not None:
            self.reload(is_birth=True)
            threading.Thread(target=self._watch, name="fault-plan", daemon=True).start()

    def at(self, point: Point, peer: str = "", message: str = "") -> Fault | None:
        """What goes wrong now, if anything. STOP and KILL have happened already when this returns, and are not told.

        The first rule that fires wins; all rules that are meant count the occasion.
        """
        with self._lock:
            fired = [armed.fire() for armed in self._armed.get(point, ()) if armed.meets(peer, message)]
            fault = next((fault for fault in fired if fault is not None), None)
            if fault is not None:
                self.counts[f"{point}/{fault.action}"] += 1
        if fault is None or fault.action not in _ENDINGS:
            return fault
        log.warning("fault plan: %s of %s at %s", fault.action, self._me, point)
        self._act(fault)
        return None

    def counters(self) -> dict[str, float]:
        """How many faults happened at each point, as counters of a status: `fault_hinge_out_total`."""
        totals: Counter[str] = Counter()
        with self._lock:
            for name, count in self.counts.items():
                totals[f"fault_{name.partition('/')[0].replace('.', '_')}_total"] += count
        return {name: float(count) for name, count in totals.items()}

    def reload(self, *, is_birth: bool = False) -> None:
        """Take the file's rules if it changed. One that cannot be read is named in the log, and the rules stay.

        At a process's birth it is taken without what ends processes: whoever replaces a dead one would die of the same.
        """
        if self._file is None:
            return
        try:
            written_ns = self._file.stat().st_mtime_ns
            if written_ns == self._read_ns:
                return
            self._read_ns = written_ns
            settings = FaultSettings.model_validate(json.loads(self._file.read_bytes()))
            if settings.file is not None:
                raise ValueError("a plan's file names no other file")
        except FileNotFoundError:
            return
        except (OSError, ValueError, ValidationError) as exc:
            log.warning("fault plan %s is not taken: %s", self._file, " ".join(str(exc).split()))
            return
        if is_birth:
            rules = tuple(rule for rule in settings.rules if rule.action not in _ENDINGS)
            settings = settings.model_copy(update={"rules": rules})
        self._arm(settings)
        log.warning("fault plan of %s: %d rules from %s", self._me, len(settings.rules), self._file)

    def close(self) -> None:
        """Look at the file no more."""
        self._closed.set()

    def _arm(self, settings: FaultSettings) -> None:
        armed: dict[Point, list[_Armed]] = {}
        for index, rule in enumerate(settings.rules):
            if fnmatchcase(self._me, rule.engine):
                seed = f"{settings.seed}/{self._me}/{rule.point}/{index}"
                armed.setdefault(rule.point, []).append(_Armed(rule, seed))
        with self._lock:
            self._armed = armed

    def _watch(self) -> None:
        while not self._closed.wait(FILE_PERIOD_S):
            self.reload()


def plan_of(settings: FaultSettings, me: str) -> FaultPlan | None:
    """The plan of the process `me`; None where nothing can be injected, and callers keep what they would wrap."""
    return None if settings.is_empty else FaultPlan(settings, me=me)


def injected(point: Point) -> DiptychError:
    """The error of RAISE at `point`: that of a real failure there."""
    if point.startswith("hinge."):
        return TransferError("injected fault")
    return EngineFault("injected fault") if point.startswith("engine.") else EngineLost("injected fault")


@overload
def mutated(data: bytes, fault: Fault) -> bytes: ...


@overload
def mutated(data: bytearray | memoryview, fault: Fault) -> None: ...


def mutated(data: bytes | bytearray | memoryview, fault: Fault) -> bytes | None:
    """What CORRUPT or TRUNCATE makes of bytes: another text, never the same one unless it was empty.

    Of a buffer, which cannot become shorter, TRUNCATE spoils the end. A buffer is altered in place and None returned.
    """
    if isinstance(data, bytes):
        if fault.action is Action.TRUNCATE:
            return data[: int(fault.draw * len(data))]
        copy = bytearray(data)
        mutated(copy, fault)
        return bytes(copy)
    if not data:
        return None
    view = memoryview(data).cast("B")
    place = int(fault.draw * len(view) * 8)
    if fault.action is Action.CORRUPT:
        view[place // 8] ^= 1 << place % 8
    elif fault.action is Action.TRUNCATE:
        view[place // 8 :] = bytes(byte ^ 0xFF for byte in view[place // 8 :])
    return None
