"""Who looks on at one call: its hooks and its trace, told at the same places.

exchange.py and streams.py hold one watch for each call. Where nobody looks on, it is one object that does nothing.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .errors import CallFailed, InvalidOutput
from .hooks import AnswerCame, AttemptFailed, CallEnded, RequestBegan, ValueInvalid, is_heard, told
from .tracing import CallTrace, begun

if TYPE_CHECKING:
    from .attempts import Attempt
    from .draft import Draft, Encoded
    from .reply import Reply
    from .retries import Course, Next
    from .upstream import Wire

T = TypeVar("T")
_NOTHING: AbstractContextManager[None] = nullcontext()


class Watch:
    """Of a call that nobody looks on at. Entered for the call's life; what it raises ends it."""

    __slots__ = ()

    def asks(self, draft: Draft[Any], sent: Encoded, number: int, why: str) -> Encoded:
        """An attempt goes out: `sent`, with what it needs to be traced further."""
        return sent

    def tried(self, attempt: Attempt, wire: Wire) -> None:
        """It is over."""

    def after(self, course: Course, error: CallFailed) -> Next:
        """What follows a failure, as Course.after says and raises."""
        return course.after(error, time.monotonic())

    def ended(self, reply: Reply[T]) -> Reply[T]:
        """The call has its reply."""
        return reply

    def inside(self) -> AbstractContextManager[None]:
        """Around the developer's own functions: calls that they make are below this one in its trace."""
        return _NOTHING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _Looking(Watch):
    """Of a call that somebody looks on at."""

    __slots__ = ("_began", "_draft", "_is_over", "_origin", "_trace")

    def __init__(self, draft: Draft[Any], trace: CallTrace | None) -> None:
        self._origin = self._draft = draft
        self._trace = trace
        self._began = time.monotonic()
        self._is_over = False

    def asks(self, draft: Draft[Any], sent: Encoded, number: int, why: str) -> Encoded:
        self._draft = draft
        if is_heard(draft):
            told(draft, RequestBegan(draft=draft, number=number, why=why, body=dict(sent.outgoing.body)))
        return sent if self._trace is None else self._trace.asks(draft, sent, number, why)

    def tried(self, attempt: Attempt, wire: Wire) -> None:
        if self._trace is not None:
            self._trace.tried(attempt, wire)
        draft = self._draft
        if not is_heard(draft):
            return
        if attempt.answer is not None:
            told(draft, AnswerCame(draft=draft, attempt=attempt))
        if isinstance(attempt.error, InvalidOutput):
            told(draft, ValueInvalid(draft=draft, attempt=attempt))

    def after(self, course: Course, error: CallFailed) -> Next:
        draft, attempt = self._draft, course.attempts[-1]
        try:
            step = course.after(error, time.monotonic())
        except CallFailed:
            told(draft, AttemptFailed(draft=draft, attempt=attempt, is_last=True))
            raise
        told(draft, AttemptFailed(draft=draft, attempt=attempt, is_last=False, next_why=step.why))
        return step

    def ended(self, reply: Reply[T]) -> Reply[T]:
        self._over(reply, None)
        return reply

    def inside(self) -> AbstractContextManager[None]:
        return _NOTHING if self._trace is None else self._trace.inside()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over(None, error)

    def _over(self, reply: Reply[Any] | None, error: BaseException | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        if not isinstance(error, Exception):  # a machine that is closed: its caller left
            error = None
        if self._trace is not None:
            self._trace.ended(reply, error)
        seconds = time.monotonic() - self._began
        told(self._origin, CallEnded(draft=self._origin, reply=reply, error=error, seconds=seconds))


_NOBODY = Watch()


def watching(draft: Draft[Any], *, stream: bool = False) -> Watch:
    """For one call."""
    trace = begun(draft, is_stream=stream)
    return _NOBODY if trace is None and not is_heard(draft) else _Looking(draft, trace)
