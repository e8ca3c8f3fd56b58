"""The official Python client's Responses surface as its documentation shows it. The Agents SDK: test_agents_sdk.py.

Guards against events and bodies that curl can read and the client cannot: an item that changes its identity between
its events, a snapshot that does not add up, a parsed class that is lost.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from fences import URL, of_kind
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow

ASK = "Alice and Bob are going to a science fair on Friday."
SHORT = "say little <stop> t6"  # ends a text by itself


class Event(BaseModel):
    name: str = Field(min_length=1)
    participants: list[str] = Field(min_length=1)


class GetTime(BaseModel):
    """The time in a city."""

    city: str
    offset: int = Field(ge=0, le=9)


CLOCK: Any = {
    "type": "function",
    "name": "clock",
    "description": "The time of a place",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "minLength": 2}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}
NAMED: Any = {"type": "function", "name": "clock"}


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def twin(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
        yield made


def strictly(reply: Response) -> Response:
    """The client builds answers without looking; here each field is held against its type."""
    Response.model_validate(reply.to_dict())
    return reply


def call_of(reply: Any) -> Any:
    (call,) = [item for item in reply.output if item.type == "function_call"]
    return call


def test_a_text(client: openai.OpenAI) -> None:
    reply = strictly(client.responses.create(model="echo", input=SHORT, instructions="Be brief."))
    assert reply.output_text
    assert (reply.status, reply.error, reply.incomplete_details) == ("completed", None, None)
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert client.responses.retrieve(reply.id).to_dict() == reply.to_dict()


def test_a_text_that_is_cut_off(client: openai.OpenAI) -> None:
    reply = strictly(client.responses.create(model="echo", input=ASK, max_output_tokens=3))
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage is not None
    assert reply.usage.output_tokens == 3


def test_every_event_of_a_stream_is_of_its_type(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="echo", input=SHORT, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        type(event).model_validate(event.to_dict())
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    last = events[-1]
    assert last.type == "response.completed"
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == last.response.output_text
    assert client.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()


def test_parse_gives_the_class(client: openai.OpenAI) -> None:
    reply = client.responses.parse(model="echo", input=ASK, text_format=Event)
    assert isinstance(reply.output_parsed, Event)
    assert Event.model_validate_json(reply.output_text) == reply.output_parsed


def test_the_stream_helper_gives_the_class(client: openai.OpenAI) -> None:
    with client.responses.stream(model="echo", input=ASK, text_format=Event) as stream:
        events = list(stream)
        last = stream.get_final_response()
    assert isinstance(last.output_parsed, Event)
    snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    assert snapshots[-1] == last.output_text
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert done.parsed == last.output_parsed


def test_json_mode(client: openai.OpenAI) -> None:
    reply = client.responses.create(model="echo", input=ASK, text={"format": {"type": "json_object"}})
    assert isinstance(json.loads(reply.output_text), dict)


@pytest.mark.parametrize(
    "choice", ["required", NAMED, {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}], ids=str
)
def test_a_call_where_one_is_forced(client: openai.OpenAI, choice: Any) -> None:
    reply = client.responses.create(
        model="echo", input=ASK, tools=[CLOCK], tool_choice=choice, parallel_tool_calls=False
    )
    strictly(reply)
    call = call_of(reply)
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.status) == ("clock", "completed")
    assert json.loads(call.arguments).keys() == {"place"}


def test_a_pydantic_tool_in_the_stream_helper(client: openai.OpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(GetTime, name="get_time")
    flat: Any = {"type": "function", **tool["function"]}
    asked: Any = {"model": "echo", "input": ASK, "tools": [flat], "tool_choice": "required"}
    with client.responses.stream(**asked, parallel_tool_calls=False) as stream:
        events = list(stream)
        last = stream.get_final_response()
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    call = call_of(last)
    assert deltas[-1].snapshot == call.arguments
    assert GetTime.model_validate(call.parsed_arguments)


def test_a_conversation_that_the_server_remembers(client: openai.OpenAI) -> None:
    first = client.responses.create(model="echo", input=ASK, tools=[CLOCK], tool_choice=NAMED)
    told: Any = [{"type": "function_call_output", "call_id": call_of(first).call_id, "output": "noon <stop> t6"}]
    second = client.responses.create(model="echo", input=told, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    third = client.responses.create(model="echo", input=SHORT, previous_response_id=second.id)
    assert third.usage is not None
    assert second.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens
    (item,) = client.responses.input_items.list(second.id)
    assert item.type == "function_call_output"


def test_a_conversation_that_the_client_remembers(client: openai.OpenAI) -> None:
    """Whole items go back as the objects that the client made of them, nothing is stored."""
    history: Any = [{"role": "developer", "content": "Use the clock."}, {"role": "user", "content": ASK}]
    first = client.responses.create(
        model="echo",
        input=history,
        tools=[CLOCK],
        tool_choice=NAMED,
        store=False,
        include=["reasoning.encrypted_content"],
    )
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    history += first.output
    history.append({"type": "function_call_output", "call_id": call_of(first).call_id, "output": "noon <stop> t6"})
    second = client.responses.create(model="echo", input=history, tools=[CLOCK], tool_choice="none", store=False)
    assert second.output_text
    history += [item.model_dump() for item in second.output]
    third = client.responses.parse(
        model="echo", input=[*history, {"role": "user", "content": ASK}], text_format=Event, store=False
    )
    assert isinstance(third.output_parsed, Event)
    again: Any = [*history, *third.output, {"role": "user", "content": SHORT}]
    assert client.responses.create(model="echo", input=again, store=False).output_text


def test_pages_of_input_items(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": f"{number} <stop> t6"} for number in range(7)]
    reply = client.responses.create(model="echo", input=asked)
    page = client.responses.input_items.list(reply.id, limit=3, order="asc")
    assert page.has_more
    texts = [item.content[0].text for item in page]  # type: ignore[union-attr]
    assert texts == [f"{number} <stop> t6" for number in range(7)]
    newest = client.responses.input_items.list(reply.id)
    assert newest.data[0].content[0].text == "6 <stop> t6"  # type: ignore[union-attr]
    after = client.responses.input_items.list(
        reply.id, after=newest.data[1].id or "", include=["reasoning.encrypted_content"]
    )
    assert len(list(after)) == 5


def test_logprobs(client: openai.OpenAI) -> None:
    reply = strictly(
        client.responses.create(
            model="echo", input=SHORT, include=["message.output_text.logprobs"], top_logprobs=2, temperature=0
        )
    )
    (message,) = reply.output
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs
    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}


def test_a_background_response(client: openai.OpenAI) -> None:
    begun = strictly(client.responses.create(model="echo", input=SHORT, background=True))
    assert begun.status == "queued"
    stream = client.responses.create(model="echo", input=SHORT, background=True, stream=True)
    events = list(stream)
    assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    name = events[0].response.id  # type: ignore[union-attr]
    for after in (0, 2, len(events) - 2):
        rest = list(client.responses.retrieve(name, stream=True, starting_after=after))
        assert [event.to_dict() for event in rest] == [event.to_dict() for event in events[after + 1 :]]
    with client.responses.stream(response_id=name, starting_after=3) as resumed:
        assert resumed.get_final_response().id == name
    assert client.responses.cancel(name).status == "completed"


def test_cancel_and_delete(client: openai.OpenAI) -> None:
    begun = client.responses.create(model="echo", input=ASK, background=True, max_output_tokens=900)
    ended = client.responses.cancel(begun.id)
    assert ended.status in ("cancelled", "incomplete")
    assert client.responses.cancel(begun.id).to_dict() == ended.to_dict()
    client.responses.delete(begun.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)
    whole = client.responses.create(model="echo", input=SHORT)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(whole.id)


def test_input_tokens(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="echo", input=SHORT, tools=[CLOCK])
    reply = client.responses.create(model="echo", input=SHORT, tools=[CLOCK], tool_choice="auto", max_output_tokens=1)
    assert reply.usage is not None
    assert counted.input_tokens == reply.usage.input_tokens


def test_what_is_refused_names_its_field(client: openai.OpenAI) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strng"}}}},
            "text.format.schema.type",
        ),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        (
            {"tools": [CLOCK | {"parameters": {"type": "object", "properties": {"a": {"type": "x"}}}}]},
            "tools[0].parameters.properties.a.type",
        ),
    ]
    for more, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="echo", input=ASK, **more)
        assert caught.value.param == param


async def test_the_asynchronous_twin(twin: openai.AsyncOpenAI) -> None:
    reply = await twin.responses.create(model="echo", input=SHORT)
    assert reply.output_text
    parsed = await twin.responses.parse(model="echo", input=ASK, text_format=Event, previous_response_id=reply.id)
    assert isinstance(parsed.output_parsed, Event)
    async with twin.responses.stream(model="echo", input=ASK, text_format=Event) as stream:
        kinds = {event.type async for event in stream}
        last = await stream.get_final_response()
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    assert isinstance(last.output_parsed, Event)
    begun = await twin.responses.create(model="echo", input=SHORT, background=True, stream=True)
    events = [event async for event in begun]
    name = events[0].response.id  # type: ignore[union-attr]
    rest = [event async for event in await twin.responses.retrieve(name, stream=True, starting_after=2)]
    assert len(rest) == len(events) - 3
    assert [item.type async for item in twin.responses.input_items.list(name)] == ["message"]
    assert (await twin.responses.cancel(name)).status == "completed"
    await twin.responses.delete(name)
    with pytest.raises(openai.NotFoundError):
        await twin.responses.retrieve(name)
    assert (await twin.responses.input_tokens.count(model="echo", input="hi")).input_tokens > 1


def test_the_pages_example(base_url: str) -> None:
    (example,) = [one for one in of_kind("python openai") if one.page.stem == "responses"]
    exec(
        compile(example.code.replace(URL, base_url.removesuffix("/v1")), str(example), "exec"), {"__name__": "example"}
    )
