"""langchain-openai as its documentation shows it: structured output by its three methods, bound tools, streams.

Guards against calls that end among `invalid_tool_calls`, chunks that do not add up to a call, and parsed answers that
are None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),  # the client's, for its own `parsed`
]

ASK = "Tell me a joke about cats"
LITTLE = "say little <stop> t6"


class Joke(BaseModel):
    """A joke to tell."""

    setup: str = Field(min_length=1)
    punchline: str
    rating: int | None = Field(default=None, ge=1, le=10)


class Told(TypedDict):
    """A joke to tell."""

    setup: str
    punchline: str


SCHEMA = {
    "title": "joke",
    "description": "A joke to tell.",
    "type": "object",
    "properties": {"setup": {"type": "string"}, "rating": {"type": "integer", "minimum": 3}},
    "required": ["setup", "rating"],
    "additionalProperties": False,
}


@tool
def multiply(first: int, second: int) -> int:
    """Multiply two numbers."""
    return first * second


@tool
def reverse(text: str) -> str:
    """Turn a text round."""
    return text[::-1]


TOOLS = [multiply, reverse]


@pytest.fixture
def model(base_url: str) -> Iterator[ChatOpenAI]:
    made: Any = {"base_url": base_url, "api_key": "none", "max_retries": 0}
    with openai.DefaultHttpxClient() as http:
        yield ChatOpenAI(model="echo", stream_usage=True, http_client=http, **made)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("raw", [False, True])
def test_structured_output_of_a_class(model: ChatOpenAI, method: Any, raw: bool) -> None:
    """json_mode enforces an object, not the schema: the class stands in words, and may be refused by the client."""
    if method == "json_mode":
        found: Any = model.with_structured_output(None, method=method, include_raw=raw).invoke(ASK + " as JSON")
        found = found["parsed"] if raw else found
        assert isinstance(found, dict)
        return
    found = model.with_structured_output(Joke, method=method, include_raw=raw).invoke(ASK)
    if raw:
        assert found["parsing_error"] is None
        assert isinstance(found["raw"], AIMessage)
        assert found["raw"].invalid_tool_calls == []
        found = found["parsed"]
    assert isinstance(found, Joke)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True, False])
def test_structured_output_of_other_schemas(model: ChatOpenAI, method: Any, strict: bool | None) -> None:
    told: Any = model.with_structured_output(Told, method=method, strict=strict).invoke(ASK)
    assert told.keys() == {"setup", "punchline"}
    found: Any = model.with_structured_output(SCHEMA, method=method, strict=strict).invoke(ASK)
    assert found["rating"] >= 3


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_in_a_stream(model: ChatOpenAI, method: Any) -> None:
    parts: list[Any] = list(model.with_structured_output(Joke, method=method).stream(ASK))
    assert isinstance(parts[-1], Joke)
    told = list(model.with_structured_output(Told, method=method).stream(ASK))
    assert told[-1].keys() == {"setup", "punchline"}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"multiply", "reverse"}),
        ("required", {"multiply", "reverse"}),
        ("multiply", {"multiply"}),
        (True, {"reverse"}),
    ],
)
def test_bound_tools(model: ChatOpenAI, choice: Any, names: set[str]) -> None:
    tools = [reverse] if choice is True else TOOLS
    message = model.bind_tools(tools, tool_choice=choice).invoke("What is 3 times 12?")
    assert message.invalid_tool_calls == []
    assert message.tool_calls
    assert {call["name"] for call in message.tool_calls} <= names
    for call in message.tool_calls:
        assert call["id"]
        assert isinstance(
            multiply.invoke(call["args"]) if call["name"] == "multiply" else call["args"]["text"], int | str
        )
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] > 0


def test_free_tools_and_a_text(model: ChatOpenAI) -> None:
    message = model.bind_tools(TOOLS, parallel_tool_calls=False).invoke(LITTLE)
    assert message.content
    assert message.tool_calls == []
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["system_fingerprint"].startswith("fp_")


def test_streamed_chunks_of_calls_add_up(model: ChatOpenAI) -> None:
    chunks = list(model.bind_tools([multiply], tool_choice="any").stream("What is 3 times 12?"))
    whole: AIMessageChunk | None = None
    for chunk in chunks:
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk  # type: ignore[assignment]
    assert whole is not None
    assert sum(len(chunk.tool_call_chunks) for chunk in chunks) > 3  # type: ignore[attr-defined]
    assert whole.invalid_tool_calls == []
    assert all(call["args"].keys() == {"first", "second"} for call in whole.tool_calls)
    assert whole.usage_metadata is not None


def test_a_loop_of_tools(model: ChatOpenAI) -> None:
    messages: list[Any] = [SystemMessage("You calculate."), HumanMessage("What is 3 times 12?")]
    message = model.bind_tools(TOOLS, tool_choice="any").invoke(messages)
    messages.append(message)
    for call in message.tool_calls:
        found: ToolMessage = {"multiply": multiply, "reverse": reverse}[call["name"]].invoke(call)
        found.content = f"{found.content} <stop> t6"
        messages.append(found)
    last = model.bind_tools(TOOLS, tool_choice="none").invoke(messages)
    assert last.content
    assert last.tool_calls == []


async def test_the_asynchronous_twin(base_url: str) -> None:
    made: Any = {"base_url": base_url, "api_key": "none", "max_retries": 0}
    async with openai.DefaultAsyncHttpxClient() as http:
        model = ChatOpenAI(model="echo", http_async_client=http, **made)
        assert isinstance(await model.with_structured_output(Joke).ainvoke(ASK), Joke)
        found = await model.with_structured_output(Joke).abatch([ASK, ASK + "!"])
        assert all(isinstance(joke, Joke) for joke in found)
        parts = [part async for part in model.with_structured_output(Told).astream(ASK)]
        assert parts[-1].keys() == {"setup", "punchline"}
