"""What happens in calls, told to whoever asked: typed events, and the handlers of a registry or of one call.

watch.py tells them between the steps of a call, in the caller's thread. No event holds a key: bodies are told as they
go out, without their headers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .machine import is_async

if TYPE_CHECKING:
    from diptych.protos.messages import ToolCall

    from .attempts import Attempt
    from .draft import Draft
    from .reply import Reply

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HookEvent:
    """Something happened in the call of `draft`; a handler of this class hears all of it."""

    draft: Draft[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBegan(HookEvent):
    """An attempt goes out: its number, from 1, what it is made for (see Attempt.why), and the body as it is sent."""

    number: int
    why: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCame(HookEvent):
    """An attempt was answered, well or not: `attempt.error` tells."""

    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueInvalid(HookEvent):
    """The answer is not what the result's type takes; `attempt.error` is an InvalidOutput with its report."""

    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed(HookEvent):
    """An attempt gave no value. `next_why`: what the next one is made for; empty where `is_last`."""

    attempt: Attempt
    is_last: bool
    next_why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnded(HookEvent):
    """The end of a call: its reply, or its error; neither where its caller left. `draft` is the developer's own,
    without what later attempts were told; `seconds`: all of it.
    """

    reply: Reply[Any] | None = None
    error: BaseException | None = None
    seconds: float = 0.0

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """All of them, as far as they are known."""
        if self.reply is not None:
            return self.reply.attempts
        attempts: tuple[Attempt, ...] = getattr(self.error, "attempts", ())
        return attempts


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRan(HookEvent):
    """A tool that the model called is done; `outcome` as in outcomes.py."""

    call: ToolCall
    outcome: Any
    seconds: float = 0.0


E = TypeVar("E", bound=HookEvent)
Handler = Callable[[E], object]


class Hooks:
    """Handlers by the class of what they hear; safe to change from any thread. A handler that raises is logged, and the
    call goes on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handlers: tuple[tuple[type[HookEvent], Handler[Any]], ...] = ()

    def __bool__(self) -> bool:
        return bool(self._handlers)

    @overload
    def on(self, kind: type[E], handler: Handler[E]) -> Callable[[], None]: ...
    @overload
    def on(self, kind: type[E], handler: None = None) -> Callable[[Handler[E]], Handler[E]]: ...
    def on(self, kind: type[E], handler: Handler[E] | None = None) -> Any:
        """`handler` hears events of `kind`, HookEvent for all. Gives a function that ends it; without a handler, a
        decorator. Raises UsageError.
        """
        from .errors import UsageError

        if not (isinstance(kind, type) and issubclass(kind, HookEvent)):
            raise UsageError(
                f"hooks.on({kind!r}, ...): the first argument is a class of events, such as llm.CallEnded", "kind"
            )
        if handler is None:

            def decorate(function: Handler[E]) -> Handler[E]:
                self.on(kind, function)
                return function

            return decorate
        if not callable(handler):
            raise UsageError(f"hooks.on({kind.__name__}, {handler!r}): the handler is no function", "handler")
        if is_async(handler):
            raise UsageError(
                f"hooks.on({kind.__name__}, ...): the handler is async, and nobody would await it: write def, and "
                f"begin a task in it where it has something to wait for",
                "handler",
            )
        entry = (kind, handler)
        with self._lock:
            self._handlers = (*self._handlers, entry)

        def remove() -> None:
            with self._lock:
                self._handlers = tuple(one for one in self._handlers if one is not entry)

        return remove

    def off(self, kind: type[E], handler: Handler[E]) -> None:
        """`handler` hears no events of `kind` any more; of one that never did, nothing happens."""
        with self._lock:
            self._handlers = tuple(one for one in self._handlers if one != (kind, handler))

    def clear(self) -> None:
        """Nobody hears anything any more."""
        with self._lock:
            self._handlers = ()

    def tell(self, event: HookEvent) -> None:
        """Calls the handlers, in the order in which they came. Never raises what they raise."""
        for kind, handler in self._handlers:
            if not isinstance(event, kind):
                continue
            try:
                handler(event)
            except Exception:
                logger.exception("a handler of %s raised, and the call %s goes on", kind.__name__, event.draft.name)


def told(draft: Draft[Any], event: HookEvent) -> None:
    """To the handlers of the call's registry, then to the call's own."""
    draft.registry.hooks.tell(event)
    if draft.hooks is not None:
        draft.hooks.tell(event)


def is_heard(draft: Draft[Any]) -> bool:
    """Whether anybody hears of this call."""
    return bool(draft.registry.hooks) or bool(draft.hooks)


@overload
def on(kind: type[E], handler: Handler[E]) -> Callable[[], None]: ...
@overload
def on(kind: type[E], handler: None = None) -> Callable[[Handler[E]], Handler[E]]: ...
def on(kind: type[E], handler: Handler[E] | None = None) -> Any:
    """Of all calls by the process's own registry: see Hooks.on."""
    from .registry import default_registry

    hooks = default_registry().hooks
    return hooks.on(kind) if handler is None else hooks.on(kind, handler)
