"""/v1/messages over a whole front door: what an answer holds, block by block, and errors of every layer.

Guards against streams that say something else than the whole answer, blocks that overlap, and errors in the shape of
another wire format, which Anthropic's client cannot read. The model here says what the system prompt says.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.api.messages import Blocks
from diptych.cluster.api.prepared import prepare_chat
from diptych.cluster.api.reading import AnswerReader, Reading
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import LimitSettings
from diptych.cluster.formats.calls import write_calls
from diptych.cluster.formats.format import HERMES, REASONING_FORMATS, TOOL_FORMATS, Format, ReasoningFormat
from diptych.cluster.key_file import key_line
from diptych.cluster.keys import ApiKeys, make_key
from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.anthropic_replies import content_of, signature_of, thought_in
from diptych.protos.errors import EngineError

THINK = REASONING_FORMATS["think"]
SAYS_SYSTEM = "{{ messages[0]['content'] }}<|im_end|>{% if tools or enable_thinking %} {% endif %}"
USER = {"role": "user", "content": "hello"}
CALLS = [("weather", '{"city": "Z\u00fcrich"}'), ("clock", "{}")]
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name, _ in CALLS]
FIRST = "<think>\nhm\n</think>\n\nSure."
PATH = "/v1/messages"


@pytest.fixture
async def sayer() -> AsyncIterator[httpx2.AsyncClient]:
    """Of a model that thinks and calls tools, as its system prompt tells it to."""
    async with (
        front_door(template=SAYS_SYSTEM, format=Format(HERMES, THINK)) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as client,
    ):
        yield client


def ask(says: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "max_tokens": 400, "system": says, "messages": [USER], **fields}


async def post(http: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    reply = await http.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    assert reply.headers["request-id"] == reply.headers["x-request-id"] == found["id"]
    return found


async def streamed(http: httpx2.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await http.post(PATH, json=body | {"stream": True})
    assert reply.status_code == 200, reply.text
    return events_of(reply.text)


def events_of(text: str) -> list[dict[str, Any]]:
    found = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream as clients put it together; checks the order of the events."""
    first, ping, *blocks, delta, stop = events
    assert [first["type"], ping["type"]] == ["message_start", "ping"]
    assert [delta["type"], stop["type"]] == ["message_delta", "message_stop"]
    check_order(blocks)
    begun = first["message"]
    assert (begun["content"], begun["stop_reason"]) == ([], None)
    return {**begun, **delta["delta"], "content": content_of(blocks), "usage": begun["usage"] | delta["usage"]}


def check_order(events: list[dict[str, Any]]) -> None:
    """One block at a time, numbered from 0; deltas of its own kind."""
    kinds = {
        "text": {"text_delta"},
        "thinking": {"thinking_delta", "signature_delta"},
        "tool_use": {"input_json_delta"},
    }
    number, kind = -1, None
    for event in events:
        if event["type"] == "content_block_start":
            assert kind is None
            number, kind = number + 1, event["content_block"]["type"]
        assert event["index"] == number
        assert kind is not None
        if event["type"] == "content_block_delta":
            assert event["delta"]["type"] in kinds[kind]
        if event["type"] == "content_block_stop":
            kind = None
    assert kind is None


def alike(message: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two answers to the same."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    use = message["usage"]
    tokens = use["input_tokens"] + use["cache_read_input_tokens"], use["output_tokens"]
    return {"content": content, "reason": message["stop_reason"], "stop": message["stop_sequence"], "tokens": tokens}


THINKING = {"type": "adaptive"}
CASES: list[tuple[dict[str, Any], list[dict[str, Any]], str]] = [
    (ask("hi \u00fc \U0001f600"), [{"type": "text", "text": "hi \u00fc \U0001f600"}], "end_turn"),
    (ask(""), [], "end_turn"),
    (
        ask(FIRST, thinking=THINKING),
        [
            {"type": "thinking", "thinking": "hm", "signature": signature_of("hm", carries=False)},
            {"type": "text", "text": "Sure."},
        ],
        "end_turn",
    ),
    (
        ask(FIRST, thinking=THINKING | {"display": "omitted"}),
        [
            {"type": "thinking", "thinking": "", "signature": signature_of("hm", carries=True)},
            {"type": "text", "text": "Sure."},
        ],
        "end_turn",
    ),
    (ask(FIRST), [{"type": "text", "text": "Sure."}], "end_turn"),
    (
        ask("Sure. " + write_calls(HERMES, CALLS, in_text=True), tools=TOOLS),
        [
            {"type": "text", "text": "Sure."},
            {"type": "tool_use", "name": "weather", "input": {"city": "Z\u00fcrich"}},
            {"type": "tool_use", "name": "clock", "input": {}},
        ],
        "tool_use",
    ),
]


@pytest.mark.parametrize(("body", "content", "reason"), CASES, ids=range(len(CASES)))
async def test_what_is_said_is_in_blocks(
    sayer: httpx2.AsyncClient, body: dict[str, Any], content: list[dict[str, Any]], reason: str
) -> None:
    whole = await post(sayer, body)
    assert (alike(whole)["content"], whole["stop_reason"], whole["stop_sequence"]) == (content, reason, None)
    events = await streamed(sayer, body)
    assert alike(folded(events)) == alike(whole)


async def test_the_tokens_of_thinking_are_told(sayer: httpx2.AsyncClient) -> None:
    use = (await post(sayer, ask(FIRST, thinking=THINKING)))["usage"]
    assert 0 < use["output_tokens_details"]["thinking_tokens"] < use["output_tokens"]


@pytest.mark.parametrize("stops", [["never", "b c"], ["b c", "b c d"]])
async def test_the_stop_sequence_that_was_found_is_named(sayer: httpx2.AsyncClient, stops: list[str]) -> None:
    body = ask("a b c d", stop_sequences=stops)
    whole = await post(sayer, body)
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "b c")
    assert whole["content"] == [{"type": "text", "text": "a "}]
    again = folded(await streamed(sayer, body))
    assert (again["content"], again["stop_sequence"]) == (whole["content"], "b c")


async def test_more_tokens_than_fit_may_be_asked_for(sayer: httpx2.AsyncClient) -> None:
    assert (await post(sayer, ask(max_tokens=10**6)))["stop_reason"] == "end_turn"
    assert (await post(sayer, ask("a long one", max_tokens=2)))["stop_reason"] == "max_tokens"
    nothing = await post(sayer, ask(max_tokens=0))
    assert (nothing["content"], nothing["stop_reason"], nothing["usage"]["output_tokens"]) == ([], "max_tokens", 0)


async def test_an_answer_that_fills_the_context_says_so(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    """The echo of a prompt without an end token goes on until there is no room."""
    words = "hello " * 500
    counted = (
        await http.post(f"{PATH}/count_tokens", json={"model": "echo", "messages": [USER | {"content": words}]})
    ).json()
    whole = await post(http, {"model": "echo", "max_tokens": 5000, "messages": [USER | {"content": words}]})
    assert counted["input_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]
    assert whole["stop_reason"] in ("end_turn", "model_context_window_exceeded")


async def test_a_budget_where_no_engine_could_keep_it_is_refused(sayer: httpx2.AsyncClient) -> None:
    reply = await sayer.post(PATH, json=ask(thinking={"type": "enabled", "budget_tokens": 5}))
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("thinking.budget_tokens cannot be kept")


@pytest.mark.parametrize("form", [None, {"format": {"type": "json_schema", "schema": {"type": "object"}}}])
async def test_a_budget_reaches_the_engines(door: FrontDoor, form: Any) -> None:
    start, end = "<|im_start|>", "<|endoftext|>"
    ids = {mark: door.tokenizer.token_to_id(mark) for mark in (start, end)}
    model = replace(door.served, format=Format(None, ReasoningFormat("marks", start, end)), markers=ids)
    fields = {} if form is None else {"output_config": form}
    for thinking, budget in (({"type": "enabled", "budget_tokens": 5}, 5), ({"type": "adaptive"}, None)):
        request = parse_messages(json.dumps(ask(thinking=thinking, **fields)).encode())
        constraint = (await prepare_chat(request, model, 2048)).constraint
        if form is None and budget is None:
            assert constraint is None
        else:
            assert constraint is not None
            assert constraint.reasoning is not None
            assert (constraint.reasoning.end, constraint.reasoning.budget) == (ids[end], budget)


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"json": ask(model="nobody")}, 404, "not_found_error"),
    ({"json": ask(foo=1)}, 400, "invalid_request_error"),
    ({"json": ask(), "headers": {"anthropic-version": "latest"}}, 400, "invalid_request_error"),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_request_error"),
    ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 400, "invalid_request_error"),
    ({"content": b" " * 70_000, "headers": {"content-type": "application/json"}}, 413, "request_too_large"),
]


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
@pytest.mark.parametrize(("sent", "status", "kind"), WRONG, ids=range(len(WRONG)))
async def test_errors_are_told_in_anthropics_shape(path: str, sent: dict[str, Any], status: int, kind: str) -> None:
    if path.endswith("count_tokens") and "json" in sent:
        sent = sent | {"json": {name: value for name, value in sent["json"].items() if name != "max_tokens"}}
    limits = LimitSettings(body_bytes=65_536)
    async with front_door(limits) as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
        reply = await http.post(path, **sent)
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["error"].keys() == {"type", "message", "details"}
    assert body["request_id"] == reply.headers.get("request-id")


async def test_other_paths_and_methods(http: httpx2.AsyncClient) -> None:
    for method, path, status in (("GET", PATH, 405), ("POST", f"{PATH}/batches", 404), ("GET", f"{PATH}/", 404)):
        reply = await http.request(method, path)
        assert reply.status_code == status
        assert reply.json()["type"] == "error"
    theirs = await http.get("/v1/skills", headers={"anthropic-version": "2023-06-01"})
    assert theirs.json()["error"]["type"] == "not_found_error"
    ours = await http.get("/v1/skills")
    assert ours.json()["error"]["type"] == "invalid_request_error"
    assert "param" in ours.json()["error"]


async def test_a_failure_amid_a_stream_is_its_last_event(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    await door.decode_alone()
    door.decode.faults.error = EngineError("it broke")
    door.decode.faults.error_at = 5
    reply = await http.post(PATH, json={"model": "echo", "max_tokens": 50, "messages": [USER], "stream": True})
    events = events_of(reply.text)
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"
    assert events[-1]["request_id"] == reply.headers["request-id"]


async def test_models_in_both_shapes(http: httpx2.AsyncClient) -> None:
    theirs = {"anthropic-version": "2023-06-01"}
    page = (await http.get("/v1/models", headers=theirs)).json()
    assert page.keys() == {"data", "has_more", "first_id", "last_id"}
    assert page["data"][0] == (await http.get("/v1/models/echo", headers=theirs)).json()
    assert (page["data"][0]["type"], page["data"][0]["id"], page["has_more"]) == ("model", "echo", False)
    behind = (await http.get("/v1/models?after_id=echo&limit=5", headers=theirs)).json()
    assert behind == {"data": [], "has_more": False, "first_id": None, "last_id": None}
    assert (await http.get("/v1/models")).json()["object"] == "list"
    for query in ("limit=0", "limit=x", "after_id=nobody", "lifecycle=old", "page=2", "after_id=echo&before_id=echo"):
        reply = await http.get(f"/v1/models?{query}", headers=theirs)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error"), query


def test_a_model_is_told_that_a_call_failed(door: FrontDoor) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no"}
    for is_error in (True, False):
        turns = [
            USER,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result | {"is_error": is_error}]},
        ]
        request = parse_messages(json.dumps(ask(messages=turns)).encode())
        text = door.served.renderer.chat_text(request.messages, options=request.template)
        assert ("The call failed:\nno" in text) == is_error


async def test_a_wrong_key_is_refused_in_anthropics_shape(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(key_line(make_key("a")[1]))
    file.chmod(0o600)
    async with front_door(keys=ApiKeys(file)) as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
        for path in (PATH, f"{PATH}/count_tokens", f"{PATH}/x"):
            reply = await http.post(path, json=ask(), headers={"x-api-key": "wrong"})
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "authentication_error"


TEXTS = ["hello", "<think>\nhm {\n</think>\n\nok", "<think>cut", "", "calls", "thought and calls", "text and calls"]


@given(
    st.sampled_from([*TOOL_FORMATS.values()]),
    st.sampled_from(TEXTS),
    st.lists(st.integers(0, 10**6), max_size=6),
    st.booleans(),
)
def test_however_a_text_is_cut_its_blocks_are_the_same(format: Any, text: str, places: list[int], omits: bool) -> None:
    if text.endswith("calls"):
        lead = {"calls": "", "thought and calls": "<think>hm</think>", "text and calls": "Sure. "}[text]
        text = lead + write_calls(format, CALLS, in_text=bool(lead) and "<" not in lead)
    at = sorted({place % (len(text) + 1) for place in places})
    pieces = [text[begin:end] for begin, end in zip([0, *at], [*at, len(text)], strict=True)]

    def read(pieces: list[str]) -> list[dict[str, Any]]:
        reader = AnswerReader(Reading(format=Format(format, THINK), tool_names=("weather", "clock")))
        blocks = Blocks(is_omitted=omits)
        events = [event for piece in pieces for event in blocks.said(reader.feed(piece))]
        events += [*blocks.said(reader.finish()), *blocks.end()]
        check_order(events)
        return [{name: value for name, value in block.items() if name != "id"} for block in content_of(events)]

    whole = read([text])
    assert read(pieces) == read(list(text)) == whole
    for block in whole:
        if block["type"] == "thinking":
            assert (block["thinking"] == "") == omits
            assert (thought_in(block["signature"]) is not None) == omits
