"""Answers to a schema that a provider's dialect changed, as answers to the client's own: nulls that stand for members
that are absent are taken out, of the text and of calls' arguments, whole or as they come.

provider_target.py asks for one where the notes of an encoding say so. The rules are protos/providers/schema_values.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content
from diptych.protos.messages import Part, Text, ToolCall
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Note
from diptych.protos.providers.schema_values import NullFilter, restore
from diptych.protos.providers.schemas import needs_restoring
from diptych.protos.replies import Ended, Event, Reply
from diptych.protos.wire_checks import JsonObject, compact


class Restoring:
    """Of one answer. `form` is the schema of its text, `tools` those of arguments, by the functions' names."""

    def __init__(self, form: JsonObject | None, tools: Mapping[str, JsonObject]) -> None:
        self._form = form
        self._tools = tools
        self._text = None if form is None else NullFilter(form)
        self._arguments: NullFilter | None = None  # of the call that is being told

    def reply(self, reply: Reply) -> Reply:
        """The whole answer."""
        parts = tuple(self._part(part) for part in reply.message.parts)
        return replace(reply, message=replace(reply.message, parts=parts))

    def _part(self, part: Part) -> Part:
        if isinstance(part, Text) and self._form is not None:
            return replace(part, text=_restored(part.text, self._form))
        if isinstance(part, ToolCall) and part.name in self._tools:
            schema = self._tools[part.name]
            return replace(part, text=_restored(part.text, schema), arguments=restore(part.arguments, schema))
        return part

    async def events(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The answer as it comes."""
        try:
            async for event in events:
                for told in self._event(event):
                    yield told
        finally:
            await events.aclose()

    def _event(self, event: Event) -> list[Event]:
        match event:
            case Content(text) if self._text is not None:
                left = self._text.feed(text)
                return [Content(left)] if left else []
            case CallBegin(name=name) if name in self._tools:
                self._arguments = NullFilter(self._tools[name])
            case CallArguments(index, text) if self._arguments is not None:
                left = self._arguments.feed(text)
                return [CallArguments(index, left)] if left else []
            case CallEnd(index) if self._arguments is not None:
                rest, self._arguments = self._arguments.end(), None
                return [CallArguments(index, rest), event] if rest else [event]
            case Ended() if self._text is not None and (rest := self._text.end()):
                return [Content(rest), event]
        return [event]


def restoring(request: ChatRequest, notes: Sequence[Note]) -> Restoring | None:
    """What undoes the changes that `notes` tell of; None where there is nothing to undo."""
    if not needs_restoring(notes):
        return None
    form, use = request.output_form, request.tool_use
    tools = () if use is None else use.tools
    return Restoring(
        form.schema if form is not None and _is_changed(form.path, notes) else None,
        {
            tool.name: tool.parameters
            for at, tool in enumerate(tools)
            if _is_changed(tool.path or f"tools[{at}].function", notes)
        },
    )


def _is_changed(path: str, notes: Sequence[Note]) -> bool:
    own = [note for note in notes if note.field == path or note.field.startswith((f"{path}.", f"{path}["))]
    return needs_restoring(own)


def _restored(text: str, schema: JsonObject) -> str:
    """As it was written, where nothing is to be taken out; a text that was cut off, as far as it goes."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        filtered = NullFilter(schema)
        return filtered.feed(text) + filtered.end()
    found = restore(value, schema)
    return text if found == value else compact(found)
