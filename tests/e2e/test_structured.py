"""Answers that keep a form, through a listener, a router and two engines with real grammars and no model.

Guards against a form that one endpoint, stream or engine forgets, an answer that changes when an engine dies amid it,
and shapes that differ from OpenAI's documented ones.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest
from small_cluster import ECHO, SETTINGS, WAIT_S, SmallCluster, connected, small_cluster
from small_host import hosted

from diptych.protos.settings import EchoSettings
from diptych.protos.types import GENERATING, EngineRef, Role

ASK = [{"role": "user", "content": "t1 t2"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 3},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
OBJECT = {"type": "object"}
PATTERN = r"[a-z]{3}-\d\d"
CHOICES = ["yes", "no way"]
GRAMMAR = 'start: "a" ("b" | "c") "d"'
SENTENCES = {"regex": PATTERN, "choice": "yes|no way", "grammar": "a[bc]d"}
GUIDED = {
    "guided_json": ({"guided_json": PERSON}, PERSON),
    "guided_json as text": ({"guided_json": json.dumps(PERSON)}, PERSON),
    "guided_regex": ({"guided_regex": PATTERN}, "regex"),
    "guided_choice": ({"guided_choice": CHOICES}, "choice"),
    "guided_grammar": ({"guided_grammar": GRAMMAR}, "grammar"),
    "structured_outputs json": ({"structured_outputs": {"json": PERSON}}, PERSON),
    "structured_outputs regex": ({"structured_outputs": {"regex": PATTERN}}, "regex"),
    "structured_outputs choice": ({"structured_outputs": {"choice": CHOICES}}, "choice"),
    "structured_outputs grammar": ({"structured_outputs": {"grammar": GRAMMAR}}, "grammar"),
    "structured_outputs json_object": ({"structured_outputs": {"json_object": True}}, OBJECT),
    "json_object": ({"response_format": {"type": "json_object"}}, OBJECT),
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "w", "parameters": PERSON}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "weather"}}
SLOW = SETTINGS.model_copy(update={"echo": EchoSettings(step_s=0.005)})


def formed(schema: object, **more: object) -> dict[str, Any]:
    """OpenAI's way to ask for it."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, **more}}}


GUIDED["json_schema"] = (formed(PERSON), PERSON)
GUIDED["json_schema strict"] = (formed(PERSON, strict=True, description="who"), PERSON)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with hosted() as cluster:
        yield cluster.listener.url


@pytest.fixture
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=WAIT_S) as client:
        yield client


def asked(http: httpx2.Client, path: str = "chat/completions", **body: Any) -> httpx2.Response:
    """Greedy, and to the end: what a form allows ends in far fewer tokens."""
    prompt = {"messages": ASK} if path == "chat/completions" else {"prompt": "t1 t2"}
    return http.post(f"/v1/{path}", json={"model": ECHO, "temperature": 0, "max_tokens": 300, **prompt, **body})


def answered(http: httpx2.Client, path: str = "chat/completions", **body: Any) -> dict[str, Any]:
    reply = asked(http, path, **body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def chunks_of(reply: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream that ended well."""
    assert reply.status_code == 200, reply.text
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def streamed(http: httpx2.Client, path: str = "chat/completions", **body: Any) -> list[dict[str, Any]]:
    return chunks_of(asked(http, path, stream=True, **body))


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def joined(chunks: list[dict[str, Any]], index: int = 0) -> tuple[str, str]:
    """The text of a streamed choice, and why it ended."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    texts = [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices]
    reasons = [choice["finish_reason"] for choice in choices]
    assert not any(reasons[:-1])
    return "".join(texts), reasons[-1]


def fits(text: str, form: object) -> bool:
    if isinstance(form, str):
        return re.fullmatch(SENTENCES[form], text) is not None
    return jsonschema_rs.is_valid(form, json.loads(text))


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_every_way_to_ask_at_both_endpoints_whole_and_streamed(http: httpx2.Client, name: str, path: str) -> None:
    body, form = GUIDED[name]
    reply = asked(http, path, **body)
    assert reply.status_code == 200, reply.text
    assert reply.headers.get("x-schema-coverage") == (None if isinstance(form, str) else "full")
    assert "x-schema-unsupported" not in reply.headers
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert "schema_errors" not in choice
    assert fits(text_of(choice), form)
    again = asked(http, path, stream=True, **body)
    assert again.headers.get("x-schema-coverage") == reply.headers.get("x-schema-coverage")
    assert joined(chunks_of(again)) == (text_of(choice), "stop")


def test_headers_tell_any_name(http: httpx2.Client) -> None:
    """Names that are not ASCII stood there as `??`; one with a line's end must not make a header of its own."""
    listed = {"type": "array", "items": {"type": "null"}, "uniqueItems": True}
    reply = asked(http, **formed({"type": "object", "properties": {"\u00e9\r\nx-evil: 1": listed}}))
    assert "x-evil" not in reply.headers
    where = "response_format.json_schema.schema.properties['\\xe9\\r\\nx-evil: 1'].uniqueItems"
    assert reply.headers["x-schema-unsupported"] == f"uniqueItems at {where}"


def test_an_echoed_prompt_is_no_part_of_what_is_checked(http: httpx2.Client) -> None:
    """Each answer to a request with `echo` came with schema_errors: the prompt is no JSON."""
    (choice,) = answered(http, "completions", guided_json=PERSON, echo=True)["choices"]
    assert choice["text"].startswith("t1 t2{")
    assert "schema_errors" not in choice


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**formed(PERSON), "bad_words": ["{"]}, "bad_words"),
        ({**formed(PERSON), "allowed_token_ids": [5]}, "allowed_token_ids"),
        (
            {
                **formed(PERSON),
                "messages": [*ASK, {"role": "assistant", "content": "{]"}],
                "continue_final_message": True,
            },
            "messages",
        ),
    ],
)
def test_what_an_engine_refuses_names_the_field(
    http: httpx2.Client, body: dict[str, Any], param: str, stream: bool
) -> None:
    reply = asked(http, stream=stream, **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_what_no_grammar_says_is_told_before_and_after(http: httpx2.Client) -> None:
    """An answer that breaks a keyword that is not enforced passed for a good one."""
    twins = {"type": "array", "items": {"enum": ["x"]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    schema = {"type": "object", "properties": {"twins": twins}, "required": ["twins"]}
    before = out_of_form(http)
    reply = asked(http, **formed(schema))
    assert reply.headers["x-schema-coverage"] == "partial"
    where = "response_format.json_schema.schema.properties.twins.uniqueItems"
    assert reply.headers["x-schema-unsupported"] == f"uniqueItems at {where}"
    (choice,) = reply.json()["choices"]
    assert text_of(choice) == '{"twins":["x","x"]}'
    (told,) = choice["schema_errors"]
    assert "twins" in told
    chunks = streamed(http, **formed(schema))
    assert chunks[-1]["choices"][0]["schema_errors"] == [told]
    assert not any("schema_errors" in chunk["choices"][0] for chunk in chunks[:-1])
    (text,) = answered(http, "completions", guided_json=schema)["choices"]
    assert text["schema_errors"] == [told]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    called = asked(http, tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}})
    assert called.headers["x-schema-coverage"] == "partial"
    (error,) = called.json()["choices"][0]["schema_errors"]
    assert error.startswith("tool_calls[0].function.arguments: ")
    assert out_of_form(http) == before + 4


def out_of_form(http: httpx2.Client) -> float:
    page = http.get("/metrics").text
    found = re.findall(r"^diptych_\w*answers_out_of_form_total\{[^}]*\} (\S+)$", page, re.MULTILINE)
    return sum(float(number) for number in found)


def test_a_cut_answer_is_the_beginning_of_the_whole_one(http: httpx2.Client) -> None:
    whole = answered(http, **formed(PERSON))
    text, tokens = text_of(whole["choices"][0]), whole["usage"]["completion_tokens"]
    for most in (1, 2, tokens // 2, tokens - 2):
        (choice,) = answered(http, max_tokens=most, **formed(PERSON))["choices"]
        assert choice["finish_reason"] == "length"
        assert "schema_errors" not in choice
        assert text.startswith(text_of(choice))
        assert len(text_of(choice)) == most
        assert joined(streamed(http, max_tokens=most, **formed(PERSON))) == (text_of(choice), "length")


def test_several_choices(http: httpx2.Client) -> None:
    both = answered(http, n=2, **formed(PERSON))
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert all(fits(text_of(choice), PERSON) for choice in both["choices"])
    chunks = streamed(http, n=2, stream_options={"include_usage": True}, **formed(PERSON))
    for index, choice in enumerate(both["choices"]):
        assert joined(chunks, index) == (text_of(choice), "stop")
    *most, last = chunks
    assert last["choices"] == []
    counts = {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert counts == {name: both["usage"][name] for name in counts}
    assert all(chunk["usage"] is None for chunk in most)


def test_logprobs_are_those_of_the_text(http: httpx2.Client) -> None:
    (choice,) = answered(http, logprobs=True, top_logprobs=2, **formed(PERSON))["choices"]
    told = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in told) == text_of(choice)
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in told)
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed(http, logprobs=True, **formed(PERSON))]
    tokens = [entry["token"] for part in parts if part is not None for entry in part["content"]]
    assert tokens == [entry["token"] for entry in told]


def test_a_stream_tells_the_parts_that_are_finished(http: httpx2.Client) -> None:
    chunks = streamed(http, structured=True, **formed(PERSON))
    events = [event for chunk in chunks for event in chunk["choices"][0]["delta"].get("structured", ())]
    value = json.loads(joined(chunks)[0])
    assert {event["path"]: event["value"] for event in events if "value" in event} == {
        "/name": value["name"],
        "/age": value["age"],
        **{f"/tags/{i}": tag for i, tag in enumerate(value["tags"])},
    }
    assert [event for event in events if "closed" in event] == [
        {"path": "/tags", "closed": "array"},
        {"path": "", "closed": "object"},
    ]


def test_an_answer_that_is_begun_is_finished_in_its_form(http: httpx2.Client) -> None:
    """Repair of one field: what stands is kept, what follows it is generated."""
    begun = '{"name":"Bob \\"B\\"","age":'
    messages = [*ASK, {"role": "assistant", "content": begun}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, **formed(PERSON)}
    (choice,) = answered(http, **body)["choices"]
    assert fits(begun + text_of(choice), PERSON)
    assert json.loads(begun + text_of(choice))["name"] == 'Bob "B"'
    assert "schema_errors" not in choice
    chunks = streamed(http, structured=True, **body)
    assert joined(chunks) == (text_of(choice), "stop")
    paths = [event["path"] for chunk in chunks for event in chunk["choices"][0]["delta"].get("structured", ())]
    assert paths[0] == "/age"
    assert paths[-1] == ""


MESSAGE_KEYS = {"role", "content", "refusal"}


def test_the_shape_of_a_whole_answer(http: httpx2.Client) -> None:
    reply = asked(http, **formed(PERSON))
    told = reply.json()
    assert list(told) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert reply.headers["x-request-id"] == told["id"]
    (choice,) = told["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == MESSAGE_KEYS
    assert (choice["message"]["role"], choice["message"]["refusal"], choice["logprobs"]) == ("assistant", None, None)
    use = told["usage"]
    assert use["total_tokens"] == use["prompt_tokens"] + use["completion_tokens"]
    assert use["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert use["prompt_tokens_details"].keys() == {"cached_tokens"}
    others = [answered(http)["system_fingerprint"], answered(http, "completions")["system_fingerprint"]]
    others += [chunk["system_fingerprint"] for chunk in streamed(http, max_tokens=2)]
    assert set(others) == {told["system_fingerprint"]}
    assert re.fullmatch("fp_[0-9a-f]{12}", told["system_fingerprint"])


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        ("required", {"weather", "clock"}, "tool_calls"),
        (NAMED, {"weather"}, "stop"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}, {"weather"}, "tool_calls"),
    ],
    ids=["required", "named", "allowed"],
)
def test_calls_whole_and_streamed(
    http: httpx2.Client, choice: object, names: set[str], reason: str, parallel: bool
) -> None:
    body = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}
    (whole,) = answered(http, **body)["choices"]
    message = whole["message"]
    assert message.keys() == {*MESSAGE_KEYS, "tool_calls"}
    assert (message["content"], message["refusal"], whole["finish_reason"]) == (None, None, reason)
    calls = message["tool_calls"]
    for call in calls:
        assert call.keys() == {"id", "type", "function"}
        assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
        assert call["type"] == "function"
        assert call["function"].keys() == {"name", "arguments"}
        assert call["function"]["name"] in names
        assert fits(call["function"]["arguments"], PERSON if call["function"]["name"] == "weather" else OBJECT)
    assert parallel or len(calls) == 1
    assert len({call["id"] for call in calls}) == len(calls)
    first, *middle, last = streamed(http, **body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == reason
    heard: list[dict[str, str]] = []
    for chunk in middle:
        (part,) = chunk["choices"][0]["delta"]["tool_calls"]
        if part["index"] == len(heard):
            assert part.keys() == {"index", "id", "type", "function"}
            assert part["function"]["arguments"] == ""
            heard.append(part["function"])
        else:
            assert part.keys() == {"index", "function"}
            assert part["index"] == len(heard) - 1
            assert part["function"].keys() == {"arguments"}
            heard[-1]["arguments"] += part["function"]["arguments"]
    assert heard == [call["function"] for call in calls]


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_text_where_a_call_is_free(http: httpx2.Client, choice: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "t1 <stop> t7"}], "tools": TOOLS}
    (whole,) = answered(http, tool_choice=choice, **body)["choices"]
    assert whole["finish_reason"] == "stop"
    assert whole["message"].keys() == MESSAGE_KEYS
    assert re.fullmatch(r"( ?t\d+)+", text_of(whole))
    assert joined(streamed(http, tool_choice=choice, **body)) == (text_of(whole), "stop")


def test_the_deprecated_functions(http: httpx2.Client) -> None:
    body = {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}}
    (whole,) = answered(http, **body)["choices"]
    assert whole["message"].keys() == {*MESSAGE_KEYS, "function_call"}
    assert whole["message"]["content"] is None
    assert fits(whole["message"]["function_call"]["arguments"], PERSON)
    parts = [chunk["choices"][0]["delta"].get("function_call", {}) for chunk in streamed(http, **body)]
    assert "".join(part.get("arguments", "") for part in parts) == whole["message"]["function_call"]["arguments"]
    assert [part["name"] for part in parts if "name" in part] == ["weather"]


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (formed({"type": "strng"}), f"{SCHEMA}.type"),
        (formed({"type": "object", "properties": {"a": {"minimum": "3"}}}), f"{SCHEMA}.properties.a.minimum"),
        (formed({"$ref": "#/$defs/none"}), f"{SCHEMA}.$ref"),
        ({"guided_json": {"type": "strng"}}, "guided_json.type"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: b"}, "guided_grammar"),
        ({"guided_choice": ["a", "a"]}, "guided_choice[1]"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
        ({"guided_choice": ["a"], "min_tokens": 3}, "min_tokens"),
        ({"tools": [CLOCK], "min_tokens": 3}, "min_tokens"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}}
                ]
            },
            "tools[0].function.parameters.properties.a.type",
        ),
        ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice.function.name"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_obeyed_is_refused_at_once(
    http: httpx2.Client, body: dict[str, Any], param: str, stream: bool
) -> None:
    reply = asked(http, stream=stream, **body)
    assert reply.status_code == 400, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"


def test_a_model_tells_what_it_can_do(http: httpx2.Client) -> None:
    told = http.get(f"/v1/models/{ECHO}").json()["capabilities"]
    assert {entry["id"]: entry["capabilities"] for entry in http.get("/v1/models").json()["data"]} == {ECHO: told}
    assert set(told["constraints"]) == {"json_schema", "json_object", "regex", "choice", "grammar"}
    assert told["schema"]["strict"] == "always"
    assert told["tools"]["choices"] == ["auto", "none", "required", "named", "allowed_tools"]
    assert told["reasoning"] is None


async def test_fifty_schemas_at_once_are_not_mixed_up(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=WAIT_S) as client:

        async def one(number: int) -> None:
            schema = {"type": "object", "properties": {f"p{number}": {"const": number}}, "required": [f"p{number}"]}
            body = {
                "model": ECHO,
                "messages": ASK,
                "max_tokens": 60,
                **formed(schema | {"additionalProperties": False}),
            }
            reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            assert json.loads(text_of(reply.json()["choices"][0])) == {f"p{number}": number}

        await asyncio.gather(*(one(number) for number in range(50)))


def wide(number: int) -> dict[str, Any]:
    """A schema that is work to compile."""
    field = {"type": "string", "pattern": f"^[a-z]{{{number % 7 + 1}}}[0-9]{{1,40}}$"}
    names = [f"field_{number}_{i}" for i in range(120)]
    return {"type": "object", "properties": dict.fromkeys(names, field), "required": names}


@pytest.fixture
async def four() -> AsyncIterator[SmallCluster]:
    """Two engines of each role; slow enough that one can die amid an answer."""
    with tempfile.TemporaryDirectory(prefix="d-") as name:
        folder = Path(name)
        async with small_cluster(folder, folder, num=dict.fromkeys(GENERATING, 2), settings=SLOW) as made:
            yield await connected(made)


@pytest.mark.parametrize("role", list(GENERATING))
async def test_an_engine_that_dies_amid_an_answer_in_a_form(four: SmallCluster, role: Role) -> None:
    """The guide of the next engine begins where the text is, not anew."""
    schema = {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 2}
    body = {"model": ECHO, "messages": ASK, "max_tokens": 300, "temperature": 0, "structured": True, **formed(schema)}
    async with httpx2.AsyncClient(base_url=four.listener.url, timeout=WAIT_S) as client:
        calm = await client.post("/v1/chat/completions", json={**body, "stream": True})
        wanted = chunks_of(calm)
        killed = False
        lines: list[str] = []
        async with client.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True, "explain": True}
        ) as reply:
            async for line in reply.aiter_lines():
                lines.append(line)
                if len(lines) == 20 and not killed:
                    await four.kill(busiest(four, role))
                    killed = True
    assert killed
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [line for line in lines if line][-1] == "data: [DONE]"
    (told,) = chunks.pop()["diptych"]["choices"]
    assert joined(chunks) == joined(wanted)
    assert fits(joined(chunks)[0], schema)
    assert events_of(chunks) == events_of(wanted)
    if role is Role.DECODE:
        assert told["attempts"] - 1 + told["migrations"] == 1


def busiest(cluster: SmallCluster, role: Role) -> EngineRef:
    """The engine of a role that answers, or one of them where none does."""

    def in_flight(ref: EngineRef) -> int:
        session = cluster.router.view.session(ref)
        return session.in_flight if session is not None else 0

    return max((ref for ref in cluster.alive if ref.engine_id.startswith(role.value)), key=in_flight)


def events_of(chunks: list[dict[str, Any]]) -> list[Any]:
    return [event for chunk in chunks for event in chunk["choices"][0]["delta"].get("structured", ())]


async def test_clients_that_leave_while_guides_are_made(four: SmallCluster) -> None:
    """Nothing of them stays: no block, no guide that fails later, no other client's answer."""
    host, _, port = four.listener.url.removeprefix("http://").partition(":")
    for number in range(12):
        told = {"model": ECHO, "messages": ASK, "max_tokens": 40, "schema_in_prompt": False, **formed(wide(number))}
        body = json.dumps(told).encode()
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        await writer.drain()
        if number % 2:  # half of them leave once an engine is asked, the others before
            async with asyncio.timeout(WAIT_S):
                while not any(session.in_flight for session in four.router.view.sessions()):  # noqa: ASYNC110  it tells nobody
                    await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()
    async with httpx2.AsyncClient(base_url=four.listener.url, timeout=WAIT_S) as client:
        reply = await client.post("/v1/chat/completions", json={"model": ECHO, "messages": ASK, **formed(PERSON)})
    assert fits(text_of(reply.json()["choices"][0]), PERSON)
    assert not any(pool.used for pool in (await four.at_rest()).values())
