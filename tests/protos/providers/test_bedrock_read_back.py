"""Conversations in Bedrock's Converse format, read back by a reader that knows that format alone.

Losses that are meant: neighbouring texts are one; the result of a tool does not repeat its name, and is of one turn
with other results and with what the user says behind them. Guards against a part of a conversation that is lost, said
twice, by the wrong speaker or in another order.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.messages import Media, Message, Reasoning, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_tools import Tool, ToolUse
from diptych.protos.providers.bedrock import ConverseCodec
from diptych.protos.providers.quirks import Quirks
from diptych.protos.wire_checks import compact

CODEC = ConverseCodec()
QUIRKS = Quirks(family="bedrock", media=frozenset({"image", "file"}))
CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"

WORDS = st.text('ab .\u00f6\n"\\{', min_size=1, max_size=8).map(lambda text: f"x{text}y")
OBJECTS = st.dictionaries(WORDS, st.none() | st.integers(-9, 9) | WORDS | st.lists(WORDS, max_size=2), max_size=2)
IMAGES = st.builds(
    lambda kind, data: Media(kind="image", path="", media_type=f"image/{kind}", data=data),
    st.sampled_from(("png", "jpeg", "webp")),
    st.sampled_from(("aGk=", "aGV5")),
)


def apart(parts: list[Any]) -> tuple[Any, ...]:
    """No two texts side by side."""
    return tuple(
        part for at, part in enumerate(parts) if not (at and isinstance(part, Text) and isinstance(parts[at - 1], Text))
    )


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """Turns without a loss: neighbours have different roles but for results, no two texts stand side by side."""
    found: list[Message] = []
    shown = st.lists(st.builds(Text, WORDS) | IMAGES, min_size=1, max_size=3).map(apart)
    for turn in range(draw(st.integers(0, 3))):
        found.append(Message(role="user", parts=draw(shown)))
        signed = st.builds(Reasoning, WORDS, st.just("EqQB")) | st.just(Reasoning("Zm8=", is_redacted=True))
        parts: list[Any] = [*draw(st.lists(signed, max_size=2)), *draw(st.lists(st.builds(Text, WORDS), max_size=1))]
        calls = []
        for number in range(draw(st.integers(0 if parts and isinstance(parts[-1], Text) else 1, 2))):
            arguments = draw(OBJECTS)
            name = draw(st.sampled_from(("f", "g_1")))
            calls.append(ToolCall(id=f"t:{turn}.{number}", name=name, arguments=arguments, text=compact(arguments)))
        found.append(Message(role="assistant", parts=(*parts, *calls)))
        for call in calls:
            inner = draw(st.lists(st.builds(Text, WORDS) | IMAGES, min_size=1, max_size=2).map(apart))
            result = ToolResult(call_id=call.id, name="", parts=inner, is_error=draw(st.booleans()))
            found.append(Message(role="tool", parts=(result,)))
    return (*found, Message(role="user", parts=draw(shown)))


def _content(blocks: list[dict[str, Any]]) -> list[Any]:
    parts: list[Any] = []
    for block in blocks:
        ((kind, told),) = block.items()
        match kind:
            case "text":
                parts.append(Text(told))
            case "image":
                data = told["source"]["bytes"]
                parts.append(Media(kind="image", path="", media_type=f"image/{told['format']}", data=data))
            case "reasoningContent" if "reasoningText" in told:
                parts.append(Reasoning(told["reasoningText"]["text"], told["reasoningText"]["signature"]))
            case "reasoningContent":
                parts.append(Reasoning(told["redactedContent"], is_redacted=True))
            case "toolUse":
                text = compact(told["input"])
                parts.append(ToolCall(id=told["toolUseId"], name=told["name"], arguments=told["input"], text=text))
            case "toolResult":
                inner = tuple(_content(told["content"]))
                is_error = told.get("status") == "error"
                parts.append(ToolResult(call_id=told["toolUseId"], name="", parts=inner, is_error=is_error))
            case _:
                raise AssertionError(f"a block of the kind {kind}")
    return parts


def read_back(messages: list[dict[str, Any]]) -> list[Message]:
    """The inverse, results apart from what the user says behind them."""
    found: list[Message] = []
    for message in messages:
        parts = _content(message["content"])
        results = [part for part in parts if isinstance(part, ToolResult)]
        assert parts[: len(results)] == results, "results come first"
        found += [Message(role="tool", parts=(result,)) for result in results]
        if others := parts[len(results) :]:
            found.append(Message(role=message["role"], parts=tuple(others)))
    return found


@settings(max_examples=30, deadline=None)
@given(conversations(), st.none() | WORDS)
def test_a_conversation_read_back_is_the_same(messages: tuple[Message, ...], system: str | None) -> None:
    before = () if system is None else (Message(role="system", parts=(Text(system),)),)
    tools = tuple(Tool(name=name, description=None, parameters={"type": "object"}) for name in ("f", "g_1"))
    use = ToolUse(tools=tools, mode="auto", names=("f", "g_1"), parallel=True)
    request = ChatRequest.model_construct(messages=(*before, *messages), model="m", tool_use=use)
    body = json.loads(json.dumps(CODEC.encode(request, model=CLAUDE, stream=False, quirks=QUIRKS).body))
    assert body.get("system", []) == ([] if system is None else [{"text": system}])
    roles = [message["role"] for message in body["messages"]]
    assert all(one != other for one, other in pairwise(roles))
    assert read_back(body["messages"]) == list(messages)
    assert [tool["toolSpec"]["name"] for tool in body["toolConfig"]["tools"]] == ["f", "g_1"]
