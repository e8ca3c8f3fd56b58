"""/v1/responses over a whole front door: what is said, kept, gone on from, and refused.

Guards against a stream and a whole answer that differ, against conversations that lose their beginning, and against
another tenant's responses: to who does not own one it is as unknown as one that never was.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.api import responses_kept
from diptych.cluster.api.reading import AnswerReader, Reading
from diptych.cluster.api.responses_endpoint import ResponseEncoder, ResponseEndpoint
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import ResponsesSettings
from diptych.cluster.formats.calls import write_calls
from diptych.cluster.formats.format import HERMES, REASONING_FORMATS, Format
from diptych.cluster.router.rig import until
from diptych.protos.errors import EngineError, Overloaded
from diptych.protos.responses import parse_responses
from diptych.protos.responses_items import FIRST_OUTPUT, ItemIds
from diptych.protos.responses_replies import ResponseWriter
from diptych.protos.responses_testing import EventReader

PATH = "/v1/responses"
THINK = REASONING_FORMATS["think"]
SAYS_SYSTEM = "{{ messages[0]['content'] }}<|im_end|>{% if tools or enable_thinking %} {% endif %}"
CALLS = [("weather", '{"city": "Z\u00fcrich"}'), ("clock", "{}")]
TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name, _ in CALLS]
SAID = "<think>\nhm\n</think>\n\nSure. " + write_calls(HERMES, CALLS, in_text=True)
NEVER = "resp_" + "0" * 24


@pytest.fixture
async def sayer() -> AsyncIterator[httpx2.AsyncClient]:
    """Of a model that thinks and calls tools, as its instructions tell it to."""
    async with (
        front_door(template=SAYS_SYSTEM, format=Format(HERMES, THINK)) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as client,
    ):
        yield client


@pytest.fixture
async def teller() -> AsyncIterator[httpx2.AsyncClient]:
    """Of a model that tells what it was told."""
    template = "{% for m in messages %}[{{ m['role'] }}: {{ m['content'] }}]{% endfor %}"
    async with (
        front_door(template=template) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as client,
    ):
        yield client


def ask(given: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "max_output_tokens": 40, "input": given, **fields}


async def post(http: httpx2.AsyncClient, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    reply = await http.post(PATH, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    assert reply.headers["x-request-id"] == found["id"]
    return found


async def refused(http: httpx2.AsyncClient, body: dict[str, Any], status: int, param: str | None) -> str:
    reply = await http.post(PATH, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
    message: str = reply.json()["error"]["message"]
    return message


def events_of(text: str) -> list[dict[str, Any]]:
    found = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def played(text: str) -> dict[str, Any]:
    reader = EventReader()
    for event in events_of(text):
        reader.take(event)
    assert reader.last is not None
    return dict(reader.last)


async def streamed(http: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    reply = await http.post(PATH, json=body | {"stream": True})
    assert reply.status_code == 200, reply.text
    return played(reply.text)


def plain(body: dict[str, Any]) -> Any:
    """A body without what differs between two that say the same."""
    text = json.dumps({name: value for name, value in body.items() if name not in ("created_at", "completed_at")})
    text = text.replace(body["id"].removeprefix("resp_"), "X")
    for item in body["output"]:
        if "call_id" in item:
            text = text.replace(item["call_id"], "Y")
    found = json.loads(text)
    found["usage"] and found["usage"].pop("input_tokens_details")
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"instructions": SAID, "tools": TOOLS, "max_output_tokens": 300},
        {"instructions": SAID, "tools": TOOLS, "tool_choice": "none", "max_output_tokens": 300},
        {"instructions": "<think>\nall of it is thought"},
        {"instructions": SAID, "include_reasoning": False, "max_output_tokens": 300},
        {"max_output_tokens": 1},
        {"instructions": "a<|im_end|>"},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "instructions": SAID},
        {"explain": True},
    ],
)
async def test_a_stream_says_what_the_whole_answer_says(sayer: httpx2.AsyncClient, fields: dict[str, Any]) -> None:
    whole = await post(sayer, ask(**fields))
    after = await streamed(sayer, ask(**fields))
    if "explain" in fields:
        assert whole.pop("diptych").keys() == after.pop("diptych").keys()
    assert plain(after) == plain(whole)
    for body in (whole, after):
        kept = (await sayer.get(f"{PATH}/{body['id']}")).json()
        assert {**kept, "diptych": None} == {**body, "diptych": None}


async def test_thoughts_words_and_calls_are_items(sayer: httpx2.AsyncClient) -> None:
    body = await post(sayer, ask(instructions=SAID, tools=TOOLS, max_output_tokens=300))
    thought, message, *calls = body["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"].strip() == "Sure."
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [(n, json.loads(a)) for n, a in CALLS]
    use = body["usage"]
    assert 0 < use["output_tokens_details"]["reasoning_tokens"] < use["output_tokens"]


async def test_logprobs_are_told_of_the_message_alone(sayer: httpx2.AsyncClient) -> None:
    fields = {"include": ["message.output_text.logprobs"], "instructions": "<think>\nhm\n</think>\n\nSure."}
    body = await post(sayer, ask(**fields))
    _, message = body["output"]
    (part,) = message["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]).endswith(part["text"].strip())
    assert len(part["logprobs"]) < body["usage"]["output_tokens"]


TEXT = SAID + " And <think> more </think> " + write_calls(HERMES, CALLS[:1], in_text=True) + " end"
TEXTS = st.sampled_from([TEXT, SAID, "plain", "<think>", "a<tool_call>{", "<tool_call>{}</tool_call>", " \n"])


@given(TEXTS, st.lists(st.integers(0, len(TEXT)), max_size=12))
def test_any_pieces_of_one_text_end_in_the_same_response(text: str, cuts: list[int]) -> None:
    bodies = []
    for places in ([], sorted({cut for cut in cuts if cut < len(text)})):
        reader = AnswerReader(Reading(format=Format(HERMES, THINK), tool_names=("weather", "clock")))
        endpoint = ResponseEndpoint(parse_responses(json.dumps(ask(stream=True)).encode()), None, records=False)
        writer = ResponseWriter({"id": NEVER}, ItemIds(NEVER, FIRST_OUTPUT))
        encoder = ResponseEncoder(endpoint, writer)
        data = endpoint.emit(writer.created())
        for start, stop in zip([0, *places], [*places, len(text)], strict=True):
            data += encoder.said(reader.feed(text[start:stop]))
        data += encoder.said(reader.finish())
        data += endpoint.emit(writer.finish("completed", use=None, ended_at=0))
        assert played(data.decode()) == writer.body
        bodies.append(plain(writer.body))
    assert bodies[0] == bodies[1]


async def test_a_conversation_goes_on_from_any_of_its_responses(teller: httpx2.AsyncClient) -> None:
    http = teller
    first = await post(http, ask("alpha", instructions="secret", max_output_tokens=1))
    second = await post(http, ask("beta", previous_response_id=first["id"], max_output_tokens=1))
    third = await post(http, ask("gamma", previous_response_id=second["id"], max_output_tokens=120))
    text = third["output"][0]["content"][0]["text"]
    assert [word in text for word in ("alpha", "beta", "gamma", "secret")] == [True, True, True, False]
    assert third["previous_response_id"] == second["id"]
    branch = await post(http, ask("delta", previous_response_id=first["id"], max_output_tokens=120))
    text = branch["output"][0]["content"][0]["text"]
    assert ("alpha" in text, "beta" in text) == (True, False)


async def test_the_same_conversation_sent_whole_is_the_same_prompt(sayer: httpx2.AsyncClient) -> None:
    """With reasoning, calls and results; by reference too."""
    first = await post(sayer, ask(instructions=SAID, tools=TOOLS, max_output_tokens=300))
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "42"}
        for item in first["output"]
        if item["type"] == "function_call"
    ]
    more = {"instructions": "so", "tools": TOOLS}
    asked = {"role": "user", "content": "hello"}
    referred = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    counts = set()
    for body in (
        ask(results, previous_response_id=first["id"], **more),
        ask([asked, *first["output"], *results], **more),
        ask([asked, *referred, *results], **more),
    ):
        counts.add((await post(sayer, body))["usage"]["input_tokens"])
    assert len(counts) == 1


async def test_what_cannot_be_gone_on_from(http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await post(http, ask("alpha"))
    second = await post(http, ask("beta", previous_response_id=first["id"]))
    third = await post(http, ask("gamma", previous_response_id=second["id"]))
    monkeypatch.setattr(responses_kept, "MAX_CHAIN", 2)
    param = "previous_response_id"
    told = await refused(http, ask(previous_response_id=third["id"]), 400, param)
    assert "responses: begin anew" in told
    monkeypatch.undo()
    monkeypatch.setattr(responses_kept, "MAX_READ_CHARS", 2000)
    assert "of JSON" in await refused(http, ask(previous_response_id=third["id"]), 400, param)
    item = {"type": "item_reference", "id": first["output"][0]["id"]}
    monkeypatch.setattr(responses_kept, "MAX_READ_CHARS", 100)
    assert "send the items" in await refused(http, ask([item]), 400, "input")
    monkeypatch.undo()
    assert (await http.delete(f"{PATH}/{first['id']}")).json()["deleted"] is True
    told = await refused(http, ask(previous_response_id=third["id"]), 400, param)
    assert "deleted or expired: send the conversation itself" in told
    assert "there is no response" in await refused(http, ask(previous_response_id=first["id"]), 404, param)
    unkept = await post(http, ask("alpha", store=False))
    await refused(http, ask(previous_response_id=unkept["id"]), 404, param)
    assert (await http.get(f"{PATH}/{unkept['id']}")).status_code == 404


@pytest.mark.parametrize(
    ("items", "status", "param"),
    [
        ([{"type": "function_call_output", "call_id": "call_1", "output": "a"}], 400, "input[0].call_id"),
        ([{"type": "item_reference", "id": "msg_" + "0" * 28}], 404, "input[0].id"),
        ([{"type": "item_reference", "id": "../" * 9}], 404, "input[0].id"),
        (
            [{"role": "user", "content": "a", "id": "x"}, {"role": "user", "content": "b", "id": "x"}],
            400,
            "input[1].id",
        ),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "AAAA"}], 400, "input[0].encrypted_content"),
        ([{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}], 400, "input[0].content[0]"),
        ("x" * 5000, 400, "input"),
    ],
)
async def test_bad_items_are_refused_with_their_place(
    http: httpx2.AsyncClient, items: Any, status: int, param: str
) -> None:
    await refused(http, ask(items), status, param)


async def test_fields_are_named_as_they_are_here(http: httpx2.AsyncClient) -> None:
    """They are read by chat's constructors, which know them by other names."""
    assert "max_output_tokens" in await refused(http, ask(max_output_tokens=10**6), 400, "max_output_tokens")
    schema = {"type": "object", "properties": {"a": {"type": "strng"}}}
    form = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    await refused(http, ask(text=form), 400, "text.format.schema.properties.a.type")
    tool = {"type": "function", "name": "f", "parameters": schema}
    await refused(http, ask(tools=[tool]), 400, "tools[0].parameters.properties.a.type")
    await refused(http, ask(model="nobody"), 404, "model")


async def test_the_oldest_turns_are_dropped_where_that_is_asked_for(teller: httpx2.AsyncClient) -> None:
    http = teller
    turns: list[Any] = [{"role": "developer", "content": "RULES"}]
    for number in range(40):
        turns += [{"role": "user", "content": f"<{number}> " + "x" * 60}, {"role": "assistant", "content": "ok"}]
    turns.append({"role": "user", "content": "last"})
    await refused(http, ask(turns), 400, "input")
    body = await post(http, ask(turns, truncation="auto", max_output_tokens=200))
    text = body["output"][0]["content"][0]["text"]
    assert body["truncation"] == "auto"
    assert "RULES" in text
    assert "<0>" not in text
    kept = body["usage"]["input_tokens"]
    assert 2048 - 200 - 100 < kept <= 2048 - 200  # as many as fit
    listed = (await http.get(f"{PATH}/{body['id']}/input_items", params={"limit": 100})).json()
    assert len(listed["data"]) == len(turns)
    await refused(http, ask("x" * 5000, truncation="auto"), 400, "input")


async def test_sealed_reasoning_comes_back_to_its_tenant_alone(sayer: httpx2.AsyncClient) -> None:
    says = {"instructions": "<think>\nhm\n</think>\n\nSure.", "include": ["reasoning.encrypted_content"]}
    first = await post(sayer, ask(store=False, **says))
    thought = first["output"][0]
    assert thought["encrypted_content"]
    bare = {"type": "reasoning", "id": thought["id"], "summary": [], "encrypted_content": thought["encrypted_content"]}
    again = await post(sayer, ask([bare, {"role": "user", "content": "so?"}], **says))
    items = (await sayer.get(f"{PATH}/{again['id']}/input_items?order=asc")).json()["data"]
    assert items[0]["encrypted_content"] == thought["encrypted_content"]
    for sealed in (thought["encrypted_content"][:-4] + "AAAA", thought["encrypted_content"][4:], "\u00e9", "A"):
        await refused(sayer, ask([bare | {"encrypted_content": sealed}], **says), 400, "input[0].encrypted_content")
    reply = await sayer.post(PATH, json=ask([bare], **says), headers={"x-tenant": "other"})
    assert reply.status_code == 400
    kept = await post(sayer, ask(instructions=says["instructions"]))
    shown = await sayer.get(f"{PATH}/{kept['id']}", params={"include[]": "reasoning.encrypted_content"})
    assert shown.json()["output"][0]["encrypted_content"]


async def test_another_tenants_response_is_as_unknown_as_one_that_never_was(http: httpx2.AsyncClient) -> None:
    """Exam row S24, for every verb."""
    mine = await post(http, ask("secret"), **{"x-tenant": "a"})
    queued = await post_background(http, "a")
    item = mine["output"][0]["id"]
    for owner, other in (("a", "b"), ("a", "")):
        as_other = {"x-tenant": other} if other else {}
        for name in (mine["id"], queued):
            answers = []
            for asked in (name, NEVER):
                verbs = [
                    await http.get(f"{PATH}/{asked}", headers=as_other),
                    await http.get(f"{PATH}/{asked}?stream=true", headers=as_other),
                    await http.delete(f"{PATH}/{asked}", headers=as_other),
                    await http.post(f"{PATH}/{asked}/cancel", headers=as_other),
                    await http.get(f"{PATH}/{asked}/input_items", headers=as_other),
                    await http.post(PATH, json=ask(previous_response_id=asked), headers=as_other),
                    await http.get(f"/v1/requests/{asked}", headers=as_other),
                ]
                assert {reply.status_code for reply in verbs} == {404}
                answers.append([reply.text.replace(asked, "X") for reply in verbs])
            assert answers[0] == answers[1]
        reply = await http.post(PATH, json=ask([{"type": "item_reference", "id": item}]), headers=as_other)
        assert reply.status_code == 404
        assert (await http.get(f"{PATH}/{mine['id']}", headers={"x-tenant": owner})).json() == mine


async def post_background(http: httpx2.AsyncClient, tenant: str) -> str:
    reply = await http.post(PATH, json=ask(background=True), headers={"x-tenant": tenant})
    assert reply.status_code == 200
    return str(reply.json()["id"])


HOSTILE = [
    "..%2f..%2fetc%2fpasswd",
    "%00",
    "resp_%00",
    "resp_" + "0" * 23,
    "resp_" + "G" * 24,
    "%27%20OR%201=1--",
    "%2e%2e",
]
HOSTILE += ["resp_" + "0" * 24 + "%0a", "resp_" + "x" * 3000, "$(id)", "%ff%fe", "\u00e9"]


@pytest.mark.parametrize("name", HOSTILE)
async def test_ids_that_are_none_are_unknown(http: httpx2.AsyncClient, name: str) -> None:
    """Exam row S25: nothing but the pattern of an id reaches the store."""
    for how, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert (await http.request(how, f"{PATH}/{name}{path}")).status_code in (404, 405), (how, path)
    await refused(http, ask(previous_response_id=name), 404, "previous_response_id")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?nonsense=1", "nonsense"),
        ("?stream=yes", "stream"),
        ("?stream=true", "stream"),
        ("?starting_after=1", "starting_after"),
        ("?starting_after=-1", "starting_after"),
        ("?starting_after=" + "9" * 30, "starting_after"),
        ("?include_obfuscation=true", "include_obfuscation"),
        ("?include=everything", "include[0]"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_1", "after"),
        ("/input_items?before=msg_1", "before"),
    ],
)
async def test_queries_that_cannot_be_meant(http: httpx2.AsyncClient, query: str, param: str) -> None:
    body = await post(http, ask(max_output_tokens=1))
    reply = await http.get(f"{PATH}/{body['id']}{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_compacting_is_refused_by_its_name(http: httpx2.AsyncClient) -> None:
    reply = await http.post(f"{PATH}/compact", json=ask())
    assert reply.status_code == 404
    assert "truncation" in reply.json()["error"]["message"]


async def test_a_failure_before_the_first_token_has_its_status(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    door.prefill.faults.silent = True
    door.decode.faults.error = EngineError("the engine gives up")
    for stream in (False, True):
        reply = await http.post(PATH, json=ask(stream=stream))
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_error")
        assert (await http.get(f"{PATH}/{reply.headers['x-request-id']}")).status_code == 404


async def test_a_failure_in_mid_stream_is_a_response_that_failed(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    await door.decode_alone()
    door.decode.faults.error = EngineError("the engine gives up")
    door.decode.faults.error_at = 5
    body = await streamed(http, ask())
    assert (body["status"], body["error"]["type"]) == ("failed", "engine_error")
    assert body["output"][0]["status"] == "incomplete"
    assert (await http.get(f"{PATH}/{body['id']}")).json() == body
    await refused(http, ask(previous_response_id=body["id"]), 400, "previous_response_id")
    reply = await http.post(PATH, json=ask())
    assert reply.json()["error"]["code"] == "engine_error"


async def test_a_response_that_cannot_be_kept_is_no_answer(
    http: httpx2.AsyncClient, door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that was told so would go on from nothing."""
    await post(http, ask())  # has made the key

    async def full(job: object) -> None:
        raise Overloaded("the store is full")

    monkeypatch.setattr(door.store, "write", full)
    reply = await http.post(PATH, json=ask())
    assert reply.status_code == 503
    last = events_of((await http.post(PATH, json=ask(stream=True))).text)[-1]
    assert (last["type"], last["code"]) == ("error", "overloaded")
    assert (await post(http, ask(store=False)))["status"] == "completed"


async def test_a_tenant_whose_room_is_used_up_is_told_before_any_work() -> None:
    """Guards against one tenant that fills the disk; what is not kept, or only counted, takes no room."""
    async with (
        front_door(responses=ResponsesSettings(tenant_bytes=100)) as door,
        httpx2.AsyncClient(base_url=door.listener.url) as http,
    ):
        name = (await post(http, ask()))["id"]
        orders = len(door.decode.orders)
        for how in ({}, {"stream": True}, {"background": True}):
            reply = await http.post(PATH, json=ask(**how))
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (403, "storage_quota_exceeded", "store")
        assert len(door.decode.orders) == orders
        await post(http, ask(store=False))
        assert (await http.post(f"{PATH}/input_tokens", json={"model": "echo", "input": "a"})).status_code == 200
        assert (await http.post(PATH, json=ask(), headers={"x-tenant": "other"})).status_code == 200
        await http.delete(f"{PATH}/{name}")
        await post(http, ask())


async def test_who_goes_away_leaves_nothing_behind() -> None:
    async with front_door(step_s=0.01) as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
        async with http.stream("POST", PATH, json=ask(max_output_tokens=1500, stream=True)) as reply:
            name = reply.headers["x-request-id"]
            await anext(reply.aiter_bytes())
        await until(lambda: not door.router.in_flight)
        assert (await http.get(f"{PATH}/{name}")).status_code == 404


async def test_a_response_is_cancelled_as_a_request_too() -> None:
    async with front_door(step_s=0.01) as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
        async with http.stream("POST", PATH, json=ask(max_output_tokens=1500, stream=True)) as reply:
            name, text = reply.headers["x-request-id"], ""
            async for piece in reply.aiter_text():
                if not text:
                    assert (await http.post(f"/v1/requests/{name}/cancel")).status_code == 200
                text += piece
        body = played(text)
        assert body["status"] == "cancelled"
        assert (await http.get(f"{PATH}/{name}")).json() == body
