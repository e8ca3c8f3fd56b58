"""What a chat answer says, in OpenAI's shapes: pieces as deltas of chunks, a whole answer as a message.

Called by sse.py and chat.py, for answers of own models and of providers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diptych.protos.deltas import CallArguments, CallBegin, Content, Reasoning, Refusal
from diptych.protos.openai import ChatRequest, GenerationRequest
from diptych.protos.openai_replies import JsonObject, chat_message

from .reading import Parts, Said


def is_legacy(request: GenerationRequest) -> bool:
    """Whether a call is told as `function_call`."""
    return isinstance(request, ChatRequest) and request.tool_use is not None and request.tool_use.is_legacy


def deltas_of(said: Sequence[Said], *, is_legacy: bool) -> list[JsonObject]:
    """What was said, as the fields of OpenAI's deltas."""
    deltas: list[JsonObject] = []
    for one in said:
        match one:
            case Content(text):
                deltas.append({"content": text})
            case Parts(events):
                if not deltas or "content" not in deltas[-1]:
                    deltas.append({})
                deltas[-1]["structured"] = events
            case Reasoning(text):
                deltas.append({"reasoning_content": text})
            case Refusal(text):
                deltas.append({"refusal": text})
            case CallBegin(index, name, call_id):
                function = {"name": name, "arguments": ""}
                begun = {"index": index, "id": call_id, "type": "function", "function": function}
                deltas.append({"function_call": function} if is_legacy else {"tool_calls": [begun]})
            case CallArguments(index, text):
                function = {"arguments": text}
                told = {"tool_calls": [{"index": index, "function": function}]}
                deltas.append({"function_call": function} if is_legacy else told)
    return deltas


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    pieces: list[str]


def message_of(said: Sequence[Said], *, is_legacy: bool) -> JsonObject:
    """The message of a whole answer."""
    content: list[str] = []
    reasoning: list[str] = []
    refusal: list[str] = []
    calls: list[_Call] = []
    for one in said:
        match one:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case Refusal(text):
                refusal.append(text)
            case CallBegin(_, name, call_id):
                calls.append(_Call(call_id, name, []))
            case CallArguments(index, text):
                calls[index].pieces.append(text)
    message = chat_message("".join(content))
    if calls or refusal:
        message["content"] = message["content"] or None
    if refusal:
        message["refusal"] = "".join(refusal)
    functions = [{"name": call.name, "arguments": "".join(call.pieces)} for call in calls]
    if calls and is_legacy:
        message["function_call"] = functions[0]
    elif calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": function}
            for call, function in zip(calls, functions, strict=True)
        ]
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    return message
