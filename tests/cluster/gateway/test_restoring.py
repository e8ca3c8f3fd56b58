"""Answers to an adapted schema come back as answers to the client's own, whole and in pieces.

Guards against a null where the client's schema allows none: its validation would fail on a right answer.
"""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journeys import HELLO, text_of
from prometheus_client import CollectorRegistry, generate_latest
from test_relay_road import relayed, router

from diptych.cluster.gateway.metrics import GatewayMetrics
from diptych.cluster.gateway.ports import Ports
from diptych.cluster.gateway.restoring import restoring
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content
from diptych.protos.messages import Message, Text, ToolCall
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.codec import Note
from diptych.protos.providers.schemas import adapt_schema
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": ["string", "null"]}},
    "required": ["a", "c"],
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("lookup", "other")]
SAID = '{"a": 1, "b": null, "c": null}'
MEANT = {"a": 1, "c": None}


def asked(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO, **fields}).encode())


def notes_at(field: str) -> tuple[Note, ...]:
    return adapt_schema(SCHEMA, "strict_plain", field=field)[1]


@pytest.mark.parametrize("way", ["whole", "stream", "relay"])
async def test_nulls_that_stand_for_nothing_are_not_told(way: str) -> None:
    """And the change is on the record, and counted."""
    registry = CollectorRegistry()
    ports = Ports(metrics=GatewayMetrics(registry))
    async with router(lambda wire: wire.well(SAID), ports=ports) as (gateway, _):
        if way == "whole":
            reply, record = await gateway.answer(asked(response_format=FORM).model_copy(update={"model": "chat"}))
            text = reply.message.content
        elif way == "stream":
            async with gateway.stream("chat", HELLO, response_format=FORM) as events:
                text = text_of([item async for item in events])
            record = events.record
        else:
            _, _, record, reply = await relayed(gateway, response_format=FORM)
            text = reply.message.content
    assert json.loads(text) == MEANT
    assert {note.kind for note in record.notes} == {"adapted"}
    counted = 'diptych_gateway_notes_total{kind="adapted",target="rig-openai.chat/here"} 1.0'
    assert counted in generate_latest(registry).decode()


def test_where_nothing_was_changed_nothing_is_undone() -> None:
    assert restoring(asked(response_format=FORM), ()) is None
    assert restoring(asked(response_format=FORM), (Note("adapted", "response_format", "pattern told"),)) is None


async def through(events: list[Event], request: ChatRequest, notes: tuple[Note, ...]) -> list[Event]:
    undone = restoring(request, notes)
    assert undone is not None

    async def source() -> Any:
        for event in events:
            yield event

    return [event async for event in undone.events(source())]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(SAID)), max_size=6), st.booleans())
def test_in_whatever_pieces_it_comes_the_same_is_left(cuts: list[int], is_call: bool) -> None:
    """Of a call, too, and only of the call whose schema was changed."""
    ends = sorted({0, *cuts, len(SAID)})
    pieces = [SAID[a:b] for a, b in pairwise(ends)]
    if is_call:
        said: list[Event] = [CallBegin(0, "lookup", "i"), *(CallArguments(0, piece) for piece in pieces), CallEnd(0)]
        same: list[Event] = [CallBegin(1, "other", "j"), CallArguments(1, SAID), CallEnd(1)]
        events = [Began(), *said, *same, Usage(), Ended("tool_calls")]
        request, notes = asked(tools=TOOLS), notes_at("tools[0].function.parameters")
    else:
        events = [Began(), *(Content(piece) for piece in pieces), Usage(), Ended("stop")]
        request, notes = asked(response_format=FORM), notes_at("response_format.json_schema.schema")
    found = asyncio.run(through(events, request, notes))
    builder = ReplyBuilder()
    for event in found:
        builder.add(event)
    reply = builder.reply()
    if is_call:
        assert [call.arguments for call in reply.message.tool_calls] == [MEANT, json.loads(SAID)]
    else:
        assert json.loads(reply.message.content) == MEANT
    assert found[-1] == events[-1]


async def test_a_text_that_is_cut_off_ends_where_it_ends() -> None:
    """What is held back as a null that may come is told when nothing comes."""
    request, notes = asked(response_format=FORM), notes_at("response_format.json_schema.schema")
    events: list[Event] = [Began(), Content('{"a": 1, "b": nu'), Usage(), Ended("length")]
    found = await through(events, request, notes)
    assert "".join(event.text for event in found if isinstance(event, Content)) == '{"a": 1, "b": nu'
    assert isinstance(found[-1], Ended)


def test_a_whole_answer_is_left_as_it_was_written_where_nothing_is_to_be_undone() -> None:
    request, notes = asked(response_format=FORM, tools=TOOLS), notes_at("response_format.json_schema.schema")
    undone = restoring(request, notes)
    assert undone is not None
    call = ToolCall(id="i", name="lookup", arguments={"b": None}, text='{"b": null}')
    message = Message(role="assistant", parts=(Text('{ "a":1,  "c":"x" }'), Text(SAID), call))
    reply = undone.reply(Reply(message=message, ended=Ended("stop")))
    texts = [part.text for part in reply.message.parts if isinstance(part, Text)]
    assert texts == ['{ "a":1,  "c":"x" }', '{"a":1,"c":null}']
    assert reply.message.tool_calls == (call,)
