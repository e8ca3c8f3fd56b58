"""What a processor of an agent is, and how a chain of them is run: small objects that see what goes to a model and what
comes from it.

agent_loop.py runs the chains. It does not know what processors look for.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from diptych.protos.messages import Media, Message, Part, Reasoning, Refusal, Text, ToolCall, ToolResult

from ..errors import Blocked, UsageError
from ..machine import Awaited, Machine, take

Side = Literal["before", "after"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorContext:
    """Of one pass. `notes` is the processor's own, kept over the run and in its state: JSON, and nothing else.
    `is_final`: the answer calls no tools.
    """

    processor: str
    side: Side
    agent: str
    session: str
    deps: Any = None
    is_final: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def block(self, reason: str) -> NoReturn:
        """Ends the run: raises Blocked."""
        raise Blocked(self.processor, reason, self.side)


class Processor:
    """Override one of the two, or both; each may be a coroutine function.

    `before` sees what is about to be added to the conversation and has not been seen before: the prompt (without the
    agent's instructions), then results of tools. What it gives is what the model is told, and what stays.

    `after` sees each answer, and gives what tools and the reader get of it; the conversation keeps what the model said,
    so that its beginning stays the same. Where `needs_whole` is true, a stream shows an answer only when it is whole
    and has passed.
    """

    needs_whole: bool = True

    @property
    def name(self) -> str:
        """In errors, and of its notes; two of one agent need different ones."""
        return type(self).__name__

    def before(
        self, messages: Sequence[Message], ctx: ProcessorContext
    ) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """What goes to the model in place of `messages`."""
        return messages

    def after(self, message: Message, ctx: ProcessorContext) -> Message | Awaitable[Message]:
        """What comes of an answer in place of `message`."""
        return message


def passed_before(
    chain: Iterable[tuple[Processor, ProcessorContext]], messages: tuple[Message, ...]
) -> Machine[tuple[Message, ...]]:
    """Through all of them, in their order. Raises Blocked, and what they raise."""
    for processor, ctx in chain:
        found: Any = processor.before(messages, ctx)
        if inspect.isawaitable(found):
            found = yield from take(Awaited(found))
        if not isinstance(found, Sequence) or not all(isinstance(one, Message) for one in found):
            raise UsageError(f"{processor.name}.before(...) gave {_told(found)}; it gives a list of messages")
        messages = tuple(found)
    return messages


def passed_after(chain: Iterable[tuple[Processor, ProcessorContext]], message: Message) -> Machine[Message]:
    """Through all of them, in their order. Raises Blocked, and what they raise."""
    for processor, ctx in chain:
        found: Any = processor.after(message, ctx)
        if inspect.isawaitable(found):
            found = yield from take(Awaited(found))
        if not isinstance(found, Message):
            raise UsageError(f"{processor.name}.after(...) gave {_told(found)}; it gives a message")
        message = found
    return message


def with_texts(
    message: Message, change: Callable[[str], str], *, calls: bool = False, thoughts: bool = False
) -> Message:
    """`message` with each of its texts changed: words, refusals, results of tools; on request arguments of calls, and
    reasoning that can be read (whose signature then holds no more: for readers, never for a model).
    """
    parts = tuple(_changed(part, change, calls, thoughts) for part in message.parts)
    if all(new is old for new, old in zip(parts, message.parts, strict=True)):
        return message
    return replace(message, parts=parts)


def _changed(part: Part, change: Callable[[str], str], calls: bool, thoughts: bool) -> Part:
    match part:
        case Text() | Refusal():
            text = change(part.text)
            return part if text == part.text else replace(part, text=text)
        case Reasoning() if thoughts and not part.is_redacted:
            text = change(part.text)
            return part if text == part.text else replace(part, text=text)
        case ToolResult():
            inner = tuple(one if isinstance(one, Media) else _text(one, change) for one in part.parts)
            return part if inner == part.parts else replace(part, parts=inner)
        case ToolCall() if calls:
            return _call(part, change)
        case _:
            return part


def _text(part: Text, change: Callable[[str], str]) -> Text:
    text = change(part.text)
    return part if text == part.text else replace(part, text=text)


def _call(call: ToolCall, change: Callable[[str], str]) -> ToolCall:
    if not call.arguments:  # none, or a text that is no JSON
        text = change(call.text)
        return call if text == call.text else replace(call, text=text)
    arguments = mapped(call.arguments, change)
    if arguments == call.arguments:
        return call
    return replace(call, arguments=arguments, text=json.dumps(arguments, ensure_ascii=False))


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with each of its texts changed; names of fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [mapped(one, change) for one in value]
    if isinstance(value, dict):
        return {name: mapped(one, change) for name, one in value.items()}
    return value


def _told(found: object) -> str:
    return "None (is a return missing?)" if found is None else f"a {type(found).__name__}"
