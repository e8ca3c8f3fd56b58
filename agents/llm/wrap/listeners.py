"""Handlers of a wrapped client's events, by the names that Instructor gave them.

They stand on our own hooks, so that they run in the thread of the caller, between two requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import InvalidOutput, UsageError
from ..hooks import AnswerCame, AttemptFailed, Hooks, RequestBegan
from ..machine import is_async
from ..usage import Spent

if TYPE_CHECKING:
    from .upstreams import SdkUpstream

EventName = Literal[
    "completion:kwargs",
    "completion:response",
    "completion:usage",
    "completion:error",
    "completion:last_attempt",
    "parse:error",
]
NAMES: tuple[EventName, ...] = get_args(EventName)
Handler = Callable[..., object]
logger = logging.getLogger(__name__)


class WrapHooks:
    """Handlers by events; for a client, or one call of it.

    completion:kwargs         (**kwargs)    what the maker's `create` is called with
    completion:response       (response)    the maker's own object; of a stream, the list of its events
    completion:usage          (spent, *, attempt_number)    llm.Spent of all attempts so far
    completion:error          (error, *, attempt_number, max_attempts, is_last_attempt)    no answer came
    parse:error               the same, of an answer that is not what the type takes
    completion:last_attempt   the same; nothing follows, the call raises
    """

    def __init__(self) -> None:
        self._handlers: dict[str, list[Handler]] = {}

    def on(self, name: EventName, handler: Handler) -> None:
        """`handler` is called at each `name`; what it raises is logged and changes nothing. Raises UsageError."""
        if not callable(handler):
            raise UsageError(f"a handler of {_known(name)} is a function, not {handler!r}", "handler")
        if is_async(handler):
            raise UsageError(f"a handler of {_known(name)} is called, not awaited: write def, not async def", "handler")
        self._handlers.setdefault(_known(name), []).append(handler)

    def off(self, name: EventName, handler: Handler) -> None:
        """No longer; a handler that is not there is no error."""
        handlers = self._handlers.get(_known(name), [])
        if handler in handlers:
            handlers.remove(handler)

    def clear(self, name: EventName | None = None) -> None:
        """No handlers of `name`, or none at all."""
        if name is None:
            self._handlers.clear()
        else:
            self._handlers.pop(_known(name), None)

    def __bool__(self) -> bool:
        return any(self._handlers.values())

    def __add__(self, other: WrapHooks) -> WrapHooks:
        both = WrapHooks()
        for one in (self, other):
            for name, handlers in one._handlers.items():
                both._handlers.setdefault(name, []).extend(handlers)
        return both

    def tell(self, name: EventName, /, *args: Any, **told: Any) -> None:
        """Calls the handlers, each with those keywords that it takes."""
        for handler in tuple(self._handlers.get(name, ())):
            try:
                handler(*args, **_taken(handler, told))
            except Exception:
                logger.warning("a handler of %s failed", name, exc_info=True)


def heard(hooks: WrapHooks, upstream: SdkUpstream, max_attempts: int) -> Hooks | None:
    """Our own hooks of one call that tell `hooks`; None where nobody listens."""
    if not hooks:
        return None
    found = Hooks()
    spent = Spent()

    def began(event: RequestBegan) -> None:
        hooks.tell("completion:kwargs", **upstream.kwargs(deepcopy(event.body)))  # a look at it, not a hand on it

    def came(event: AnswerCame) -> None:
        nonlocal spent
        if event.attempt.answer is None:
            return
        spent += event.attempt.spent
        hooks.tell("completion:response", upstream.native)
        hooks.tell("completion:usage", spent, attempt_number=event.attempt.number)

    def failed(event: AttemptFailed) -> None:
        error = event.attempt.error
        assert error is not None
        told = {
            "attempt_number": event.attempt.number,
            "max_attempts": max_attempts,
            "is_last_attempt": event.is_last,
        }
        hooks.tell("parse:error" if isinstance(error, InvalidOutput) else "completion:error", error, **told)
        if event.is_last:
            hooks.tell("completion:last_attempt", error, **told)

    found.on(RequestBegan, began)
    found.on(AnswerCame, came)
    found.on(AttemptFailed, failed)
    return found


def _known(name: str) -> str:
    if name not in NAMES:
        close = get_close_matches(str(name), NAMES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"there is no event {name!r}: {hint}there are {', '.join(NAMES)}", "name")
    return name


def _taken(handler: Handler, told: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = signature(handler).parameters
    except (TypeError, ValueError):  # some of those written in C do not tell
        return told
    if any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values()):
        return told
    return {name: value for name, value in told.items() if name in parameters}
