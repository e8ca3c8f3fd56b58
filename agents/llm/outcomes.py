"""What became of a model's calls of tools, as values, and the turns of the conversation that tell the model of it.

tool_runs.py makes ToolOutcomes, reply.py goes on from them. A tool may return or raise Retry and Failed, return
NeedsApproval and Deferred, or return any other value, which is Ok.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic_core import PydanticSerializationError, to_json

from diptych.protos.messages import Media, Message, Text, ToolCall, ToolResult

from .conversation import Content, messages_of
from .errors import UsageError

T = TypeVar("T")
MOST_CHARS = 50_000  # of a result that the model is told
MOST_ERROR_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class Ok(Generic[T]):
    """The tool ran; `value` is what it returned."""

    value: T


class _Told(Exception):
    """Words for the model; a value, and raisable."""

    __match_args__ = ("message",)

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The words."""
        return str(self.args[0])

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.args == getattr(other, "args", None)

    def __hash__(self) -> int:
        return hash((type(self), self.args))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"


class Retry(_Told):
    """The model is told to call again, otherwise: `message` says how."""


class Failed(_Told):
    """The model is told that the call failed, and why."""


@dataclass(frozen=True, slots=True)
class NeedsApproval:
    """A person must say yes first: run_tools(approved={call_id: True}). `args`: what the tool would be called with."""

    reason: str = ""
    args: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Deferred:
    """The result comes from elsewhere, later: resume([result(call_id, value)]). `token` is the developer's own."""

    token: str = ""


Outcome = Ok[Any] | Retry | Failed | NeedsApproval | Deferred
OUTCOMES = (Ok, Retry, Failed, NeedsApproval, Deferred)


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """Of one call. `parts` is what the model is told of it; empty while that is open."""

    call: ToolCall
    outcome: Outcome
    seconds: float = 0.0
    parts: tuple[Text | Media, ...] = field(default=(), repr=False)

    @property
    def is_settled(self) -> bool:
        """Whether the model can be told."""
        return not isinstance(self.outcome, NeedsApproval | Deferred)

    @property
    def is_error(self) -> bool:
        """Whether the model is told of a failure."""
        return isinstance(self.outcome, Retry | Failed)

    @property
    def value(self) -> Any:
        """What the tool returned. Raises UsageError where it did not."""
        if isinstance(self.outcome, Ok):
            return self.outcome.value
        raise UsageError(f"{self.call.name} returned no value, its outcome is {self.outcome!r}")

    def turn(self) -> Message:
        """As a turn of the conversation. Raises UsageError while the outcome is open."""
        if not self.is_settled:
            raise UsageError(_open_words(self))
        told = self.parts or settled(self.call, self.outcome).parts
        result = ToolResult(call_id=self.call.id, name=self.call.name, parts=told, is_error=self.is_error)
        return Message(role="tool", parts=(result,))


@dataclass(frozen=True, slots=True)
class Result:
    """A result that came from elsewhere; see `result`."""

    call_id: str
    value: Any


Results = ToolOutcome | Result | Sequence[Content | Message | ToolOutcome | Result]  # of the calls of an answer


def result(call_id: str, value: Any) -> Result:
    """The result of the call with this id, for resume: of a Deferred one, or in place of a run. `value` may be anything
    that a tool may return, llm.Failed(...) included.
    """
    return Result(call_id, value)


def settled(call: ToolCall, found: Any, *, seconds: float = 0.0, most_chars: int = MOST_CHARS) -> ToolOutcome:
    """The outcome for what a tool returned; what has no JSON is Failed."""
    if isinstance(found, NeedsApproval | Deferred):
        return ToolOutcome(call, found, seconds)
    if isinstance(found, Ok):
        found = found.value
    if not isinstance(found, Retry | Failed):
        try:
            return ToolOutcome(call, Ok(found), seconds, parts_of_result(call.name, found, most_chars))
        except Failed as exc:
            found = exc.with_traceback(None)
    words = cut(found.message, min(most_chars, MOST_ERROR_CHARS)) or "no reason was told"
    told = f"Error: {words}" if isinstance(found, Failed) else f"{words}\nCall again, with this put right."
    return ToolOutcome(call, found, seconds, (Text(sound(told)),))


def parts_of_result(tool: str, value: Any, most_chars: int = MOST_CHARS) -> tuple[Text | Media, ...]:
    """What the model is told of `value`: texts as they are, parts as parts, everything else as JSON. Raises Failed that
    names the type and the remedy.
    """
    many = isinstance(value, list | tuple) and any(isinstance(one, Text | Media) for one in value)
    told: list[Text | Media] = []
    left = most_chars
    for one in value if many else [value]:
        if isinstance(one, Media):
            told.append(_placed(one, tool))
            continue
        text = one.text if isinstance(one, Text) else one if isinstance(one, str) else _json(tool, one)
        text = cut(sound(text), left)
        left = max(0, left - len(text))
        told.append(Text(text))
    return tuple(told)


def _json(tool: str, value: Any) -> str:
    from .reply import Reply, Unset

    if isinstance(value, Reply):  # a call of a model as a tool
        if value.tool_calls and isinstance(value.result, Unset):
            names = ", ".join(call.name for call in value.tool_calls)
            raise Failed(
                f"the tool {tool} is a call of a model, which calls {names} and has given no value: run these in a "
                f"function of your own, or take Agent(...).as_tool()"
            )
        value = value.value
        if isinstance(value, str):
            return value
    kind = type(value).__name__
    remedy = "return a text, a dict, a list, a pydantic model or a dataclass"
    if isinstance(value, Iterator) or inspect.isawaitable(value):
        raise Failed(f"the tool {tool} returned a {kind}, which has no JSON: {remedy}")
    try:
        return to_json(value, inf_nan_mode="strings").decode()
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as exc:
        why = cut(str(exc).splitlines()[0] if str(exc) else type(exc).__name__, 200)
        raise Failed(f"the tool {tool} returned a {kind}, which has no JSON ({why}): {remedy}") from exc


def _placed(media: Media, tool: str) -> Media:
    from dataclasses import replace

    return replace(media, path=f"the result of the tool {tool}")


def sound(text: str) -> str:
    """Without halves of surrogate pairs, which no request can hold."""
    return text.encode("utf-8", "replace").decode()


def cut(text: str, most: int) -> str:
    """At most `most` characters of it, and a note of what is missing."""
    if len(text) <= most:
        return text
    return f"{text[:most]}\n[cut here: these are the first {most} of {len(text)} characters; ask for less at a time]"


def words_of(error: BaseException | None) -> str:
    """What it says; nothing where a developer's own class cannot even say it."""
    try:
        return str(error)
    except Exception:
        return ""


def messages_of_outcomes(content: Any, calls: Sequence[ToolCall]) -> tuple[Message, ...]:
    """The turns for `content`: what run_tools gave, results, and behind them whatever a prompt may be. Empty where
    `calls` is empty and there are no outcomes in it. Tool turns that are messages already may be among them. Raises
    UsageError where a call has no outcome, or an open one.
    """
    given = list(content) if isinstance(content, list | tuple) else [content]
    found: list[_Given] = [one for one in given if _is_outcome(one)]
    rest = [one for one in given if not _is_outcome(one)]
    if not calls and not found:
        return ()
    told = [_turn_of(call, found) for call in calls]
    if found:
        extra = _id_of(found[0])
        names = ", ".join(f"{call.id} ({call.name})" for call in calls) or "none"
        raise UsageError(f"resume(...): there is a result for {extra!r} too many; the model's calls are: {names}")
    if missing := [call for call, one in zip(calls, told, strict=True) if one is None]:
        names = ", ".join(f"{call.name} ({call.id})" for call in missing)
        raise UsageError(
            f"resume(...): the model calls {names}, and there is no result: give what reply.run_tools() returned, or "
            f"llm.result(call_id, value)"
        )
    turns = tuple(one for one in told if one is not None)
    return (*turns, *(messages_of(rest, "resume(...)") if rest else ()))


_Given = ToolOutcome | Result | Message


def _is_outcome(one: object) -> bool:
    return isinstance(one, ToolOutcome | Result) or (isinstance(one, Message) and one.result is not None)


def _id_of(one: _Given) -> str:
    if isinstance(one, Message):
        return "" if one.result is None else one.result.call_id
    return one.call.id if isinstance(one, ToolOutcome) else one.call_id


def _is_open(one: _Given) -> bool:
    return isinstance(one, ToolOutcome) and not one.is_settled


def _turn_of(call: ToolCall, found: list[_Given]) -> Message | None:
    """For `call`, taken out of `found`; what is settled wins over an outcome that is open."""
    same = [one for one in found if _id_of(one) == call.id]
    if not same:
        return None
    best = next((one for one in same if not _is_open(one)), same[0])
    for one in same:
        if one is best or _is_open(one):
            del found[next(at for at, other in enumerate(found) if other is one)]
    if isinstance(best, Message):
        return best
    return best.turn() if isinstance(best, ToolOutcome) else settled(call, best.value).turn()


def _open_words(open_one: ToolOutcome) -> str:
    name, call_id = open_one.call.name, open_one.call.id
    if isinstance(open_one.outcome, NeedsApproval):
        why = f" ({open_one.outcome.reason})" if open_one.outcome.reason else ""
        return (
            f"resume(...): the call of {name} waits for approval{why}: reply.run_tools(approved={{{call_id!r}: True}}, "
            f"done=outcomes)"
        )
    return f"resume(...): the result of {name} is still to come: add llm.result({call_id!r}, value)"
