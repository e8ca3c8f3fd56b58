"""The life of a request: its states, which may follow which, how long each took, and how it is ended from outside.

Router.generate drives one Life per call; registry.py keeps the requests that clients ask about. Knows no engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import Cancelled, DeadlineExceeded, DiptychError

log = logging.getLogger(__name__)

KEPT_PLACEMENTS = 8  # of a life: a moved request that waits for room tries again and again


class State(StrEnum):
    """Where a request is.

        received --> queued --> placing --> placed --> prefilling --> decoding --> finished
           |           |           |         |  |          |  ^         |  ^
           |           |           |         |  '----------)--)---------)--'   token 0 without a word before it
           |           |           |         '-------------+--)---------+----> moving --> placed
           '-----------+-----------'                          '-- (never back)
                       |
                    refused       and from each of them but the ends: failed, cancelled

    received: the API reads, checks and renders it. queued: it waits for a place in the router. placing: it waits for
    engines. placed: they have their orders. prefilling: one of them computes the prompt. decoding: the client has
    tokens. moving: an attempt failed and the next one is not placed yet. refused: no engine ever heard of it.
    """

    RECEIVED = "received"
    QUEUED = "queued"
    PLACING = "placing"
    PLACED = "placed"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    MOVING = "moving"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"


_BROKEN = frozenset({State.FAILED, State.CANCELLED})
_UNSEEN = _BROKEN | {State.REFUSED}
_SENT = _BROKEN | {State.MOVING, State.FINISHED}
FOLLOWS: dict[State, frozenset[State]] = {
    State.RECEIVED: _UNSEEN | {State.QUEUED},
    State.QUEUED: _UNSEEN | {State.PLACING},
    State.PLACING: _UNSEEN | {State.PLACED},
    State.PLACED: _SENT | {State.PREFILLING, State.DECODING},
    State.PREFILLING: _SENT | {State.DECODING},
    State.DECODING: _SENT,
    State.MOVING: _BROKEN | {State.PLACED},
    State.FINISHED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.REFUSED: frozenset(),
}
ENDS = frozenset(state for state, after in FOLLOWS.items() if not after)


class WrongTransition(AssertionError):
    """A state followed one that it cannot follow: a defect of whoever drives the life."""


@dataclass(frozen=True, slots=True)
class Wrongs:
    """What becomes of a wrong transition: counted and logged; raised where `is_strict`, as under test."""

    metrics: RouterMetrics
    is_strict: bool = False

    def report(self, name: str, before: State, after: State) -> None:
        """Raises WrongTransition where it should."""
        self.metrics.counters["wrong_transitions"].labels(before.value, after.value).inc()
        message = f"request {name or 'without a name'} cannot go from {before} to {after}"
        log.error("%s", message)
        if self.is_strict:
            raise WrongTransition(message)


@dataclass(slots=True)
class Placed:
    """One attempt: its engines, when they got it (seconds since the arrival), and the error that ended it."""

    prefill_engine: str
    decode_engine: str
    path: str
    at_s: float
    ended_by: str = ""


class Life:
    """Of one call. One event loop; `clock` in seconds. It begins as received at `since`, which may be past."""

    __slots__ = (
        "_clock",
        "_last_entered",
        "_seconds",
        "_since",
        "_wrongs",
        "born",
        "error_code",
        "error_message",
        "interrupts",
        "name",
        "num_placements",
        "num_prompt_tokens",
        "num_tokens",
        "placements",
        "state",
    )

    def __init__(self, name: str, *, clock: Callable[[], float], since: float, wrongs: Wrongs) -> None:
        self.name = name
        self.born = since
        self.state = State.RECEIVED
        self.num_prompt_tokens = 0
        self.num_tokens = 0  # that the client was given
        self.placements: list[Placed] = []  # the last ones
        self.num_placements = 0
        self.error_code = ""
        self.error_message = ""
        self.interrupts = Interrupts()
        self._clock = clock
        self._since = since
        self._seconds: dict[State, float] = {}
        self._last_entered: dict[State, float] = {}
        self._wrongs = wrongs

    def enter(self, state: State) -> float:
        """The present state ends now, and `state` begins; gives the time. What has ended stays as it ended."""
        now, before = self._clock(), self.state
        if state not in FOLLOWS[before]:
            self._wrongs.report(self.name, before, state)
            if before in ENDS:
                return now
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self.state, self._since = state, now
        self._last_entered[state] = now
        return now

    def placed(self, prefill_engine: str, decode_engine: str, path: str) -> None:
        """These engines get the orders now."""
        now = self.enter(State.PLACED)
        self.num_placements += 1
        del self.placements[: len(self.placements) + 1 - KEPT_PLACEMENTS]
        self.placements.append(Placed(prefill_engine, decode_engine, path, now - self.born))

    def began(self) -> None:
        """An engine has begun to compute the prompt; its word may come late, or again after a move."""
        if self.state is State.PLACED:
            self.enter(State.PREFILLING)

    def moving(self, code: str) -> None:
        """The present attempt failed with `code`; another one may follow."""
        if self.placements:
            self.placements[-1].ended_by = code
        self.enter(State.MOVING)

    def end(self, error: BaseException | None = None) -> None:
        """It is over: finished, or by `error`; one that is no Exception means that nobody waits for it any more. What
        has ended stays as it ended.
        """
        if self.state in ENDS:
            return
        state, self.error_code, self.error_message = ending(error, self.state)
        if self.error_code and self.placements and not self.placements[-1].ended_by:
            self.placements[-1].ended_by = self.error_code
        self.enter(state)

    @property
    def outcome(self) -> str:
        """As metrics name it: ok, cancelled or an error's code."""
        return "ok" if self.state is State.FINISHED else self.error_code

    @property
    def is_over(self) -> bool:
        """Whether nothing follows."""
        return self.state in ENDS

    def entered(self, state: State) -> float | None:
        """When it was last entered, on the clock; None: never."""
        return self._last_entered.get(state)

    def seconds(self) -> dict[State, float]:
        """In each state that it was in, in the order of the first entry; the present one until now. Ends take none."""
        told = dict(self._seconds)
        if self.state not in ENDS:
            told[self.state] = told.get(self.state, 0.0) + self._clock() - self._since
        return told


def ending(error: BaseException | None, before: State) -> tuple[State, str, str]:
    """The end of what was in the state `before`, with an error's code and sentence."""
    if error is None:
        return State.FINISHED, "", ""
    if isinstance(error, Cancelled):
        return State.CANCELLED, error.code, str(error)
    if not isinstance(error, Exception):
        return State.CANCELLED, Cancelled.code, "the client went away"
    if not isinstance(error, DiptychError):
        return State.FAILED, DiptychError.code, "an internal error ended this request"
    is_unseen = State.REFUSED in FOLLOWS[before] and not isinstance(error, DeadlineExceeded)
    return State.REFUSED if is_unseen else State.FAILED, error.code, str(error)


class Interrupts:
    """Ends what a task awaits with an error of ours, wherever it waits: `with interrupts: await ...`.

    Whoever enters gets the error at once when `fire` came before. Cancels the task, as asyncio.timeout does, so that
    what is awaited cleans up after itself; who cancels the task from outside meanwhile has his way.
    """

    __slots__ = ("_before", "_has_cancelled", "_task", "error")

    def __init__(self) -> None:
        self.error: DiptychError | None = None
        self._task: asyncio.Task[object] | None = None
        self._before = 0
        self._has_cancelled = False

    def fire(self, error: DiptychError) -> None:
        """The first one counts. From the task's own event loop."""
        if self.error is not None:
            return
        self.error = error
        if self._task is not None:
            self._has_cancelled = True
            self._task.cancel()

    def __enter__(self) -> None:
        if self.error is not None:
            raise self.error
        self._task = asyncio.current_task()
        assert self._task is not None
        self._before = self._task.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if not self._has_cancelled:
            return
        self._has_cancelled = False
        assert task is not None
        assert self.error is not None
        if task.uncancel() <= self._before and (kind is None or kind is asyncio.CancelledError):
            raise self.error from None
