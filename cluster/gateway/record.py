"""What became of one request, attempt by attempt: for headers, spans, logs, ledgers and `explain`.

exchange.py and attempt.py write it while the request runs; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from diptych.cluster.providers.terms import HttpExchange
from diptych.protos.failures import Failure, FailureKind
from diptych.protos.providers.codec import Note
from diptych.protos.replies import Usage

from .limits import Allowance

if TYPE_CHECKING:
    from .ports import Context

# Why an attempt was made: the first one, after a failure before any text, beside a slow one, to go on from a text or
# to begin again after one.
Cause = Literal["first", "retry", "fallback", "hedge", "continue", "restart"]
# What the client had seen of this attempt when it ended: A nothing came, B nothing to be shown, C a part or all.
Phase = Literal["A", "B", "C"]


@dataclass(slots=True, kw_only=True)
class AttemptRecord:
    """One try at one target. Times are milliseconds since the request began. A target reads `context`, an own pool
    `traceparent` too, and writes `notes`, `http`, `is_sent` and `explanation`.
    """

    target: str
    group: str
    cause: Cause
    began_ms: float
    phase: Phase = "A"
    first_ms: float | None = None  # the first content
    ended_ms: float | None = None
    outcome: Literal["running", "answered", "failed", "lost", "left"] = "running"  # lost: to its hedge; left: by client
    failure: Failure | None = None
    usage: Usage = field(default_factory=Usage)
    output_chars: int = 0  # of its answer, as far as it came: what is paid for where no usage is told
    notes: list[Note] = field(default_factory=list)
    is_sent: bool = True  # false while a target is getting ready, so that it owes nobody anything
    http: HttpExchange | None = None  # with a provider: its request id, what is left of its rate limits
    context: Context | None = None  # whose request it is, for own pools
    traceparent: str = ""  # of its span, else of the request
    explanation: dict[str, Any] | None = None  # of an own pool, where the request asks for it

    def told(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        found: dict[str, Any] = {
            "target": self.target,
            "group": self.group,
            "cause": self.cause,
            "phase": self.phase,
            "outcome": self.outcome,
            "began_ms": round(self.began_ms, 1),
        }
        for name, value in (("first_ms", self.first_ms), ("ended_ms", self.ended_ms)):
            if value is not None:
                found[name] = round(value, 1)
        if self.failure is not None:
            found |= {"failure": self.failure.kind.value, "message": self.failure.message}
            if self.failure.status:
                found["status"] = self.failure.status
        usage = {name: value for name in Usage.__slots__ if (value := getattr(self.usage, name)) is not None}
        if usage:
            found["usage"] = usage
        if self.notes:
            found["notes"] = [f"{note.kind} {note.field}: {note.words}" for note in self.notes]
        if self.explanation is not None:
            found["explanation"] = self.explanation
        if self.http is not None and self.http.request_id:
            found["request_id"] = self.http.request_id
        return found


@dataclass(slots=True, kw_only=True)
class ExchangeRecord:
    """One request. `target` is the one whose answer the client has, the last one of several."""

    model: str
    attempts: list[AttemptRecord] = field(default_factory=list)
    target: str = ""
    outcome: str = "running"  # answered, cancelled, cached, or the code of the error
    skipped: dict[str, str] = field(default_factory=dict)  # targets that were not tried, with the reason
    words: list[str] = field(default_factory=list)  # decisions that are no attempt
    rule: str = ""  # that decided about the request
    route: str = ""  # that a rule sent it to, or `model`
    allowances: tuple[Allowance, ...] = ()  # what is left of the limits that it falls under
    cache: Literal["", "hit", "miss"] = ""  # empty: no answer to it would be kept

    @property
    def usage(self) -> Usage:
        """Of all attempts together, as far as it was told: what is paid for."""
        sums: dict[str, int | None] = {}
        for name in Usage.__slots__:
            told = [value for entry in self.attempts if (value := getattr(entry.usage, name)) is not None]
            sums[name] = sum(told) if told else None
        return Usage(**sums)

    @property
    def notes(self) -> tuple[Note, ...]:
        """What the answer's target was asked for otherwise than the client asked."""
        found = [entry for entry in self.attempts if entry.target == self.target]
        return tuple(found[-1].notes) if found else ()

    @property
    def failures(self) -> tuple[FailureKind, ...]:
        """Of all attempts, in order."""
        return tuple(entry.failure.kind for entry in self.attempts if entry.failure is not None)

    def told(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "model": self.model,
            "route": self.route or self.model,
            "rule": self.rule,
            "target": self.target,
            "outcome": self.outcome,
            "attempts": [entry.told() for entry in self.attempts],
            "skipped": dict(self.skipped),
            "words": list(self.words),
        }


# Called whenever an attempt of a request begins, with what became of the request so far. It must not raise.
Watcher = Callable[[ExchangeRecord], None]
