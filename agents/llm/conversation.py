"""What a prompt may be, and the one thing that it becomes: a tuple of canonical messages.

A text, a part, a list of both, a message, a list of messages, or a filled template. Values are parts from the start:
no text is looked through for roles, braces or anything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeGuard, get_args, runtime_checkable

from diptych.protos.messages import Media, Message, Part, Reasoning, Refusal, Role, Text, ToolCall, ToolResult, said

from .errors import UsageError

Content = str | Text | Media
_PARTS = (Text, Media, Reasoning, Refusal, ToolCall, ToolResult)
_ROLES = get_args(Role)


@runtime_checkable
class Rendered(Protocol):
    """A filled template."""

    def messages(self) -> Sequence[Message]:
        """What it says."""


Prompt = Content | Message | Rendered | Sequence["Content | Message"]


def is_rendered(value: object) -> TypeGuard[Rendered]:
    """Whether it is a filled template; a reply is none, which has its messages as data."""
    return isinstance(value, Rendered) and callable(value.messages)


def parts_of(content: Content | Sequence[Content], where: str) -> tuple[Part, ...]:
    """Texts become parts, parts stay. Raises UsageError."""
    given: Any = [content] if isinstance(content, (str, *_PARTS)) else content
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise UsageError(f"{where} is {told(content)}; it may be a text, a part (llm.image, ...), or a list of them")
    found: list[Part] = []
    for at, one in enumerate(given):
        if isinstance(one, str):
            found.append(Text(one))
        elif isinstance(one, _PARTS):
            found.append(one)
        else:
            raise UsageError(f"{where}[{at}] is {told(one)}; it may be a text or a part (llm.image, llm.document, ...)")
    return tuple(found)


def _message(role: Role, content: tuple[Content | Sequence[Content], ...], name: str | None) -> Message:
    if not content:
        raise UsageError(f"llm.{role}() says nothing: give it a text, a part, or a list of them")
    parts: list[Part] = []
    for one in content:
        parts += parts_of(one, f"llm.{role}(...)")
    if not parts:
        raise UsageError(f"llm.{role}([]) says nothing: give it a text, a part, or a list of them")
    return Message(role=role, parts=tuple(parts), name=name)


def system(*content: Content | Sequence[Content]) -> Message:
    """What the model is to be and do."""
    return _message("system", content, None)


def user(*content: Content | Sequence[Content], name: str | None = None) -> Message:
    """A turn of the one who asks; `name` tells participants apart."""
    return _message("user", content, name)


def assistant(*content: Content | Sequence[Content]) -> Message:
    """A turn of the model, for example of an earlier conversation."""
    return _message("assistant", content, None)


def messages_of(prompt: object, where: str) -> tuple[Message, ...]:
    """The conversation that `prompt` means. Raises UsageError that names `where` it came from."""
    if isinstance(prompt, str) and prompt:
        return (said("user", prompt),)
    if isinstance(prompt, (str, *_PARTS)):
        return _of_user(prompt, where)
    if isinstance(prompt, Message):
        return _said_something((_checked(prompt, where),), where)
    if is_rendered(prompt):
        return _said_something(tuple(prompt.messages()), where)
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise UsageError(
            f"{where} is {told(prompt)}; it may be a text, parts (llm.image, ...), messages (llm.system, llm.user, "
            f"...), a filled llm.Template, or a list of parts or messages"
        )
    kinds = {isinstance(one, Message) for one in prompt}
    if kinds == {True}:
        return _said_something(tuple(_checked(one, f"{where}[{at}]") for at, one in enumerate(prompt)), where)
    if True in kinds:
        at = next(at for at, one in enumerate(prompt) if not isinstance(one, Message))
        raise UsageError(f"{where}[{at}] is {told(prompt[at])} among messages: put it into llm.user(...)")
    if not prompt:
        raise UsageError(f"{where} is an empty list: there is nothing to ask")
    return _of_user(prompt, where)


def placed(messages: Sequence[Message]) -> tuple[Message, ...]:
    """`messages`, in which each media part knows its place, `messages[1].content[0]`, for errors that name it."""
    return tuple(
        replace(message, parts=tuple(_placed(part, f"messages[{at}]", i) for i, part in enumerate(message.parts)))
        if message.media
        else message
        for at, message in enumerate(messages)
    )


def _placed(part: Part, place: str, at: int) -> Part:
    if isinstance(part, Media):
        return replace(part, path=f"{place}.content[{at}]")
    if isinstance(part, ToolResult):
        inner = tuple(
            replace(one, path=f"{place}.content[{i}]") if isinstance(one, Media) else one
            for i, one in enumerate(part.parts)
        )
        return replace(part, parts=inner)
    return part


def _of_user(content: Any, where: str) -> tuple[Message, ...]:
    return _said_something((Message(role="user", parts=parts_of(content, where)),), where)


def _said_something(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    if all(isinstance(part, Text) and not part.text for message in messages for part in message.parts):
        raise UsageError(f"{where} is empty: there is nothing to ask")
    return messages


def _checked(message: Message, where: str) -> Message:
    """A message that a developer made by hand: its class checks nothing."""
    if message.role not in _ROLES:
        raise UsageError(f"{where}.role is {message.role!r}; it is one of {', '.join(_ROLES)}")
    parts: Any = message.parts
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise UsageError(f"{where}.parts is {told(parts)}; it is a tuple of parts: llm.{message.role}(...) makes one")
    for at, part in enumerate(parts):
        if not isinstance(part, _PARTS):
            raise UsageError(f"{where}.parts[{at}] is {told(part)}; it is a part, such as llm.Text or llm.image(...)")
        if isinstance(part, Text) and not isinstance(part.text, str):
            raise UsageError(f"{where}.parts[{at}].text is {told(part.text)}; it is a text")
    return message if isinstance(parts, tuple) else replace(message, parts=tuple(parts))


def told(value: object) -> str:
    """What a value is, for an error's words."""
    if value is None:
        return "None (is a return missing?)"
    hint = ""
    if isinstance(value, Awaitable):
        hint = " (is an await missing?)"
    elif callable(value):
        hint = " (is a call of it missing?)"
    elif hasattr(value, "resume"):
        hint = " (go on from it by its resume(...), or from its .messages)"
    return f"a {type(value).__name__}{hint}"
