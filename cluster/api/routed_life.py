"""The life of a routed choice, as /v1/requests tells it: its attempts are placements, with targets in place of engines.

routed.py drives it. Cancelling the request by its id ends what is awaited between `with life.interrupts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from diptych.cluster.gateway.record import AttemptRecord, ExchangeRecord
from diptych.cluster.router.life import Interrupts, State
from diptych.cluster.router.registry import Registry
from diptych.protos.failures import ProviderFailure
from diptych.protos.replies import Usage

from .generation import Origin
from .routed_headers import winner_of

PATH: Final = "route"  # of a placement: no engines were chosen here


@dataclass(slots=True)
class Work:
    """What is in work at a replica."""

    num_choices: int = 0


class RoutedLife:
    """Entered while the choice is in work; an exception that leaves it is how it ended."""

    def __init__(self, requests: Registry, work: Work, origin: Origin, model: str) -> None:
        _, self._life = requests.begin(origin.tracked, model=model, born=origin.arrived_at)
        self._work = work
        self._num_told = 0
        self._last: AttemptRecord | None = None  # of those that were told

    @property
    def interrupts(self) -> Interrupts:
        """See Interrupts."""
        return self._life.interrupts

    def __enter__(self) -> Self:
        self._work.num_choices += 1
        self._life.enter(State.QUEUED)
        self._life.enter(State.PLACING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.num_choices -= 1
        if exc is not None:
            self._fail_last()
        if exc is not None and self._life.state is State.PLACING and isinstance(exc.__cause__, ProviderFailure):
            self._life.placed("", exc.__cause__.target, PATH)  # not tried: its key is missing or refused
        self._life.end(exc)

    def answers(self, record: ExchangeRecord) -> None:
        """Content is there, the first or, behind a failure, that of another target."""
        if self._life.state is State.DECODING:
            return
        winner = winner_of(record)
        if self._last is not None and winner is not None and self._last is not winner:
            self._life.moving("lost")  # a rival, to the one beside which it was tried
        if self._life.state in (State.PLACING, State.MOVING):
            self._life.placed("", "cache" if winner is None else winner.target, PATH)
        self._life.enter(State.DECODING)

    def tried(self, record: ExchangeRecord) -> None:
        """A further attempt begins, the last one of `record`."""
        new, self._num_told = record.attempts[self._num_told :], len(record.attempts)
        for attempt in new:
            self._fail_last()
            if self._life.state is not State.PLACING and self._life.state is not State.MOVING:
                self._life.moving(attempt.cause)
            self._life.placed("", attempt.target, PATH)
            self._last = attempt

    def _fail_last(self) -> None:
        last, self._last = self._last, None
        if last is not None and last.failure is not None and self._life.state in (State.PLACED, State.DECODING):
            self._life.moving(last.failure.kind.value)

    def gave(self, used: Usage) -> None:
        """As far as anybody counted."""
        self._life.num_tokens = used.output_tokens or self._life.num_tokens
        self._life.num_prompt_tokens = used.input_tokens or self._life.num_prompt_tokens
