"""GET /openapi.json is OpenAPI 3.1, describes every route and no other, and what the routes answer is as it says.

It guards against a route without a description, and against answers that grew a field or lost one.
"""

from __future__ import annotations

import json
from typing import Any

import httpx2
import jsonschema_rs
import pytest
from starlette.routing import Route

from diptych.cluster.api.access import Access
from diptych.cluster.api.app import create_app
from diptych.cluster.api.description.document import document, error_codes, operations, shapes
from diptych.cluster.api.description.shapes import JsonObject, Operation
from diptych.cluster.api.testing import FrontDoor

HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}]
# Refused under its name, whatever is sent: nothing to describe.
UNDESCRIBED = {("POST", "/v1/responses/compact")}


def closed(schemas: JsonObject, wanted: JsonObject) -> jsonschema_rs.Validator:
    """A validator to which a field that is not declared is an error."""
    known = {name: {"additionalProperties": False, **schema} for name, schema in schemas.items()}
    known = json.loads(json.dumps(known), object_hook=_closed)
    return jsonschema_rs.validator_for({**wanted, "components": {"schemas": known}})


def _closed(schema: JsonObject) -> JsonObject:
    if schema.get("type") == "object" and "properties" in schema:
        return {"additionalProperties": False, **schema}
    return {key: value for key, value in schema.items() if key != "additionalProperties" or "anyOf" not in schema}


@pytest.fixture(scope="module")
def described() -> JsonObject:
    return document(has_keys=True)


def by_id(name: str) -> Operation:
    return next(one for one in operations() if one.id == name)


def check(described: JsonObject, name: str, body: object, *, status: int = 200, is_event: bool = False) -> None:
    """That `body` is what the operation's document says."""
    operation = by_id(name)
    reply = described["paths"][operation.path][operation.method.lower()]["responses"][str(status)]["content"]
    schema = reply["text/event-stream" if is_event else "application/json"]["schema"]
    if is_event:
        event = schema["anyOf"][0] if "anyOf" in schema else schema
        schema = event["properties"]["data"]["contentSchema"]
    validator = closed(described["components"]["schemas"], schema)
    errors = [f"{list(error.instance_path)}: {error.message}" for error in validator.iter_errors(body)]
    assert not errors, (errors[:3], body)


async def test_every_route_is_described_with_what_a_key_needs_and_nothing_else_is(door: FrontDoor) -> None:
    app = create_app(door.router, [door.served], store=door.store)
    routes = {}
    for route in app.routes:
        assert isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}:
            path = route.path.replace(":path}", "}")
            access: Access = route.access  # type: ignore[attr-defined]
            scope = "any key" if access.opens is None else access.opens.value
            routes[method, path] = "" if access is Access.OPEN else scope
    declared = {(one.method, one.path): one.scope for one in operations()}
    assert declared == {key: scope for key, scope in routes.items() if key not in UNDESCRIBED}


def test_the_document_is_openapi_with_schemas_that_are_schemas(described: JsonObject) -> None:
    assert described["openapi"].startswith("3.1.")
    for name, schema in described["components"]["schemas"].items():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
        assert name
    text = json.dumps(described)
    for reference in set(text.split('"$ref": "#/components/schemas/')[1:]):
        assert reference.split('"')[0] in described["components"]["schemas"]
    ids = [one["operationId"] for path in described["paths"].values() for one in path.values()]
    assert len(ids) == len(set(ids)) == len(operations())


def test_examples_are_what_their_schemas_allow(described: JsonObject) -> None:
    def look(value: Any) -> None:
        if isinstance(value, dict):
            if "examples" in value and "type" in value:
                for example in value["examples"]:
                    assert jsonschema_rs.is_valid(value, example), value
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(described)


def test_every_error_names_its_codes(described: JsonObject) -> None:
    codes = error_codes()
    assert {"invalid_request", "context_length_exceeded"} <= set(codes[400])
    for path in described["paths"].values():
        for operation in path.values():
            for status, reply in operation["responses"].items():
                if int(status) in codes and int(status) >= 400 and "content" in reply:
                    assert any(code in reply["description"] for code in codes[int(status)]) or status == "503"


def test_keys_are_asked_for_where_they_are() -> None:
    with_keys, without = document(has_keys=True), document(has_keys=False)
    assert with_keys["security"] == [{"bearer": []}, {"header": []}]
    assert with_keys["paths"]["/health"]["get"]["security"] == []
    assert "401" in with_keys["paths"]["/v1/models"]["get"]["responses"]
    assert "security" not in without
    assert "401" not in without["paths"]["/v1/models"]["get"]["responses"]


def test_no_shape_is_declared_for_nobody(described: JsonObject) -> None:
    assert set(shapes()) == set(described["components"]["schemas"])


CHATS: list[JsonObject] = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 4},
    {"prompt_logprobs": 1, "max_tokens": 2},
    {"explain": True, "max_tokens": 2},
    {"response_format": FORM},
    {"tools": TOOLS, "tool_choice": "required"},
    {"functions": [TOOLS[0]["function"]], "function_call": {"name": "look_up"}},
]


@pytest.mark.parametrize("fields", CHATS, ids=range(len(CHATS)))
async def test_chat_answers_as_described(http: httpx2.AsyncClient, described: JsonObject, fields: JsonObject) -> None:
    reply = await http.post("/v1/chat/completions", json={**HELLO, **fields})
    assert reply.status_code == 200, reply.text
    check(described, "createChatCompletion", reply.json())
    if "prompt_logprobs" in fields:
        return
    more: JsonObject = {"stream": True, "stream_options": {"include_usage": True}}
    if "response_format" in fields:
        more["structured"] = True
    await check_stream(http, described, "createChatCompletion", {**HELLO, **fields, **more})


async def check_stream(http: httpx2.AsyncClient, described: JsonObject, name: str, body: JsonObject) -> None:
    reply = await http.post(by_id(name).path, json=body)
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    assert len(events) > 1
    for data in events:
        check(described, name, json.loads(data), is_event=True)


TEXTS: list[JsonObject] = [
    {"prompt": "hello"},
    {"prompt": ["hello", [1, 2]], "n": 2, "logprobs": 2, "echo": True, "max_tokens": 3},
    {"prompt": "hello", "prompt_logprobs": 1, "explain": True},
]


@pytest.mark.parametrize("fields", TEXTS, ids=range(len(TEXTS)))
async def test_completions_answer_as_described(
    http: httpx2.AsyncClient, described: JsonObject, fields: JsonObject
) -> None:
    reply = await http.post("/v1/completions", json={"model": "echo", **fields})
    assert reply.status_code == 200, reply.text
    check(described, "createCompletion", reply.json())
    if "prompt_logprobs" not in fields:
        await check_stream(http, described, "createCompletion", {"model": "echo", **fields, "stream": True})


MESSAGES: list[JsonObject] = [
    {},
    {"thinking": {"type": "enabled", "budget_tokens": 1}},
    {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    {"tools": [{"name": "look_up", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}},
]


@pytest.mark.parametrize("fields", MESSAGES, ids=range(len(MESSAGES)))
async def test_messages_answer_as_described(
    http: httpx2.AsyncClient, described: JsonObject, fields: JsonObject
) -> None:
    body = {**HELLO, "max_tokens": 40, **fields}
    reply = await http.post("/v1/messages", json=body)
    assert reply.status_code == 200, reply.text
    check(described, "createMessage", reply.json())
    await check_stream(http, described, "createMessage", {**body, "stream": True})
    del body["max_tokens"]
    check(described, "countMessageTokens", (await http.post("/v1/messages/count_tokens", json=body)).json())
    refused = await http.post("/v1/messages", json={**body, "foo": 1})
    check(described, "createMessage", refused.json(), status=400)


RESPONSES: list[JsonObject] = [
    {},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "explain": True, "max_output_tokens": 2},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
    {"tools": [{"type": "function", "name": "look_up", "parameters": SCHEMA}], "tool_choice": "required"},
    {"background": True},
]


@pytest.mark.parametrize("fields", RESPONSES, ids=range(len(RESPONSES)))
async def test_responses_answer_as_described(
    http: httpx2.AsyncClient, described: JsonObject, fields: JsonObject
) -> None:
    body = {"model": "echo", "input": [{"role": "user", "content": "hello"}], **fields}
    reply = await http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    check(described, "createResponse", reply.json())
    name = reply.json()["id"]
    check(described, "getResponse", (await http.get(f"/v1/responses/{name}")).json())
    check(described, "listInputItems", (await http.get(f"/v1/responses/{name}/input_items")).json())
    await check_stream(http, described, "createResponse", {**body, "stream": True})
    check(described, "deleteResponse", (await http.delete(f"/v1/responses/{name}")).json())
    check(described, "getResponse", (await http.get(f"/v1/responses/{name}")).json(), status=404)
    told = {"model": "echo", "input": "hello"}
    check(described, "countInputTokens", (await http.post("/v1/responses/input_tokens", json=told)).json())


async def test_pages_answer_as_described(http: httpx2.AsyncClient, described: JsonObject) -> None:
    reply = await http.post("/v1/chat/completions", json=HELLO)
    name = reply.headers["x-request-id"]
    for operation, path in (
        ("listModels", "/v1/models"),
        ("getModel", "/v1/models/echo"),
        ("listRequests", "/v1/requests"),
        ("getRequest", f"/v1/requests/{name}"),
        ("getUsage", "/v1/usage"),
        ("health", "/health"),
        ("ready", "/ready"),
    ):
        check(described, operation, (await http.get(path)).json())
    check(described, "cancelRequest", (await http.post(f"/v1/requests/{name}/cancel")).json())
    check(described, "getRequest", (await http.get("/v1/requests/none")).json(), status=404)
    text = {"prompt": "hello", "return_token_strs": True}
    told = (await http.post("/v1/tokenize", json=text)).json()
    check(described, "tokenize", told)
    check(described, "detokenize", (await http.post("/detokenize", json={"tokens": told["tokens"]})).json())
    theirs = (await http.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
    check(described, "listModels", theirs)


async def test_the_served_document_is_the_declared_one(http: httpx2.AsyncClient) -> None:
    reply = await http.get("/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == document(has_keys=False)


async def test_files_and_batches_answer_as_described(http: httpx2.AsyncClient, described: JsonObject) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": HELLO}
    form = {"file": ("a.jsonl", json.dumps(line).encode() + b"\n")}
    reply = await http.post("/v1/files", files=form, data={"purpose": "batch"})
    assert reply.status_code == 200, reply.text
    check(described, "uploadFile", reply.json())
    name = reply.json()["id"]
    check(described, "getFile", (await http.get(f"/v1/files/{name}")).json())
    check(described, "listFiles", (await http.get("/v1/files")).json())
    wanted = {"input_file_id": name, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = await http.post("/v1/batches", json=wanted)
    assert batch.status_code == 200, batch.text
    check(described, "createBatch", batch.json())
    check(described, "getBatch", (await http.get(f"/v1/batches/{batch.json()['id']}")).json())
    check(described, "listBatches", (await http.get("/v1/batches")).json())
    ended = await http.post(f"/v1/batches/{batch.json()['id']}/cancel")
    check(described, "cancelBatch", ended.json(), status=ended.status_code)
    check(described, "deleteFile", (await http.delete(f"/v1/files/{name}")).json())
    check(described, "getFile", (await http.get(f"/v1/files/{name}")).json(), status=404)
