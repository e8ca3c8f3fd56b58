"""Requests whose model is a gateway route, through the whole front door, in every wire format.

They guard against an answer that loses what a provider said on its way to the client, and against a status line that is
sent before anybody knows whether there is an answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import httpx2
import pytest
import pytest_asyncio

from diptych.cluster.api.limits import together
from diptych.cluster.api.routed import RoutedModels
from diptych.cluster.api.testing import MODEL, FrontDoor, front_door, make_gateway
from diptych.cluster.batches.targets import targets_of
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import HANG, Script, ScriptedTarget, Wait, fails, says
from diptych.cluster.key_file import key_line
from diptych.cluster.keys import ApiKeys, Override, make_key
from diptych.cluster.router.rig import until
from diptych.protos.deltas import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Extras,
    Logprobs,
    Reasoning,
    Refusal,
    Signature,
)
from diptych.protos.errors import UnknownModel
from diptych.protos.failures import FailureKind
from diptych.protos.openai import parse_chat
from diptych.protos.replies import Began, Ended, Usage

pytestmark = pytest.mark.asyncio(loop_scope="module")
KIND = FailureKind
HELLO = [{"role": "user", "content": "hello"}]
USE = Usage(
    input_tokens=10,
    output_tokens=5,
    cache_read_tokens=4,
    cache_write_tokens=2,
    reasoning_tokens=3,
    input_audio_tokens=1,
)
THOUGHT: Script = [Began(), Reasoning("hm"), Signature("proof"), Content("yes"), USE, Ended("stop")]
CALLS: Script = [
    Began(),
    Content("let me see"),
    CallBegin(0, "weather", "call_1"),
    CallArguments(0, '{"city":'),
    CallArguments(0, '"Oslo"}'),
    CallEnd(0),
    Extras("fam", {"proof": "of the call"}),
    USE,
    Ended("tool_calls"),
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


class Routed(Protocol):
    def __call__(
        self, *targets: ScriptedTarget, routes: dict[str, Any] | None = None, **settings: Any
    ) -> AbstractAsyncContextManager[httpx2.AsyncClient]:
        """A client of a door whose route `chat` leads to `targets` in their order."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door() -> AsyncIterator[FrontDoor]:
    """One for all: it takes longer to start than most tests. What a test routes is a gateway of its own."""
    async with front_door(gateway=GatewaySettings()) as door:
        yield door


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(door: FrontDoor) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        yield http


@pytest.fixture
def routed(door: FrontDoor, client: httpx2.AsyncClient) -> Routed:
    models = door.routes
    assert models is not None

    @asynccontextmanager
    async def enter(
        *targets: ScriptedTarget, routes: dict[str, Any] | None = None, **settings: Any
    ) -> AsyncIterator[httpx2.AsyncClient]:
        usual = {"chat": {"targets": [target.name for target in targets], "strategy": "priority"}}
        read = GatewaySettings.model_validate({"routes": routes or usual, **settings})
        before = models.gateway
        models.gateway = make_gateway(read, door.router, door.served, targets)
        try:
            yield client
            await until(lambda: models.work.num_choices == 0)
        finally:
            await models.gateway.aclose()
            models.gateway = before

    return enter


def target(*scripts: Script, name: str = "p/a") -> ScriptedTarget:
    return ScriptedTarget(name, scripts)


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            found.append(json.loads(line.removeprefix("data: ")))
    return found


async def last_life(http: httpx2.AsyncClient) -> dict[str, Any]:
    """Of the request that came last, once it is over: that may be told after the answer's last byte."""
    async with asyncio.timeout(20):
        while not (life := (await http.get("/v1/requests")).json()["data"][0])["is_over"]:
            pass
    return cast("dict[str, Any]", life)


def messages_body(**more: Any) -> dict[str, Any]:
    return {"model": "chat", "max_tokens": 100, "messages": HELLO, **more}


async def test_chat_is_answered_whole_and_streamed_with_usage_and_headers(routed: Routed) -> None:
    async with routed(target(says("one", " two"))) as http:
        ask = {"model": "chat", "messages": HELLO}
        whole = await http.post("/v1/chat/completions", json=ask)
        body = whole.json()
        assert whole.status_code == 200
        assert (whole.headers["x-route-target"], whole.headers["x-route-attempts"]) == ("p/a", "1")
        assert whole.headers["x-request-id"] == body["id"]
        assert body["choices"][0]["message"]["content"] == "one two"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        assert body["model"] == "chat"
        options = {"stream_options": {"include_usage": True}}
        streamed = await http.post("/v1/chat/completions", json={**ask, "stream": True, **options, "explain": True})
        assert streamed.headers["x-route-target"] == "p/a"
        chunks = events(streamed.text)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == "one two"
        assert chunks[-1]["usage"]["total_tokens"] == 9
        assert chunks[-1]["diptych"]["choices"][0]["attempts"][0]["target"] == "p/a"
        assert streamed.text.endswith("data: [DONE]\n\n")


async def test_a_failure_before_the_first_text_has_its_status_and_another_target_answers(routed: Routed) -> None:
    first = target([fails(KIND.SERVER)], name="p/a")
    async with routed(first, target(says("fine"), name="q/b")) as http:
        told = await http.post("/v1/chat/completions", json={"model": "chat", "messages": HELLO, "stream": True})
        assert (told.status_code, told.headers["x-route-target"]) == (200, "q/b")
        assert int(told.headers["x-route-attempts"]) >= 2
    limited = target([fails(KIND.RATE_LIMITED, retry_after_s=500)])
    async with routed(limited) as http:
        for more in ({}, {"stream": True}):
            told = await http.post("/v1/chat/completions", json={"model": "chat", "messages": HELLO, **more})
            assert told.status_code in (429, 503)
            assert "retry-after" in told.headers
            assert told.headers["content-type"].startswith("application/json")


async def test_lives_tell_the_attempts(routed: Routed) -> None:
    """A request that a provider failed was listed as one that nobody ever heard of."""
    first, second = target([fails(KIND.AUTH)]), target(says("x"), name="q/b")
    # The first request may not be hedged yet, the second is.
    hung = ScriptedTarget("h/h", [[fails(KIND.FIRST_TOKEN_TIMEOUT)], [Wait(HANG)]])
    routes = {
        "chat": {"targets": ["p/a", "q/b"], "strategy": "priority"},
        "down": {"targets": ["p/a"]},
        "raced": {
            "targets": ["h/h", "q/b"],
            "strategy": "priority",
            "hedge": {"after": 0.01, "max_fraction": 0.5},
        },
    }
    async with routed(first, second, hung, routes=routes) as http:
        for model, state, places in (
            ("chat", "finished", ["p/a", "q/b"]),
            ("raced", "finished", ["h/h", "q/b"]),
            ("down", "failed", ["p/a"]),
        ):
            for stream in (True, False):
                ask = {"model": model, "messages": HELLO, "stream": stream}
                await http.post("/v1/chat/completions", json=ask)
                life = await last_life(http)
                assert (life["model"], life["state"]) == (model, state)
                told = [place["decode_engine"] for place in life["choices"][0]["placements"]]
                assert told[-1] == places[-1]
                assert set(told) <= set(places)


async def test_a_failure_behind_the_first_text_is_an_event_and_no_end(routed: Routed) -> None:
    broken = [Began(), Content("half"), fails(KIND.SERVER)]
    async with routed(target(broken)) as http:
        chat = await http.post("/v1/chat/completions", json={"model": "chat", "messages": HELLO, "stream": True})
        assert chat.status_code == 200
        assert "[DONE]" not in chat.text
        assert events(chat.text)[-1]["error"]["code"] == "answer_broken"
        anthropic = await http.post("/v1/messages", json=messages_body(stream=True))
        assert events(anthropic.text)[-1]["type"] == "error"
        assert "message_stop" not in anthropic.text
        responses = await http.post("/v1/responses", json={"model": "chat", "input": "hi", "stream": True})
        assert events(responses.text)[-1]["type"] == "response.failed"


async def test_going_on_elsewhere_is_a_comment(routed: Routed) -> None:
    first = target([Began(), Content("one "), fails(KIND.SERVER)], name="p/a")
    second = ScriptedTarget("q/b", [says("two")], continues="prefill")
    routes = {"chat": {"targets": ["p/a", "q/b"], "strategy": "priority", "midstream": "continue"}}
    async with routed(first, second, routes=routes) as http:
        told = await http.post("/v1/chat/completions", json={"model": "chat", "messages": HELLO, "stream": True})
        assert ": goes on at q/b after server\n\n" in told.text
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in events(told.text)) == "one two"


async def test_what_a_provider_says_reaches_anthropic_clients_as_it_was(routed: Routed) -> None:
    """A signature that is not the maker's own is refused by the maker when it comes back."""
    redacted: Script = [Began(), Signature("sealed", True), Content("x"), Usage(), Ended("length")]
    async with routed(target(THOUGHT, THOUGHT, redacted, CALLS)) as http:
        ask = messages_body(thinking={"type": "enabled", "budget_tokens": 50})
        whole = (await http.post("/v1/messages", json=ask)).json()
        thinking = {"type": "thinking", "thinking": "hm", "signature": "proof"}
        assert whole["content"] == [thinking, {"type": "text", "text": "yes"}]
        assert whole["usage"]["input_tokens"] == 4
        assert (whole["usage"]["cache_read_input_tokens"], whole["usage"]["cache_creation_input_tokens"]) == (4, 2)
        streamed = events((await http.post("/v1/messages", json={**ask, "stream": True})).text)
        assert {"type": "signature_delta", "signature": "proof"} in [one.get("delta") for one in streamed]
        assert streamed[0]["message"]["usage"]["input_tokens"] > 0
        assert streamed[-2]["usage"]["output_tokens"] == 5
        sealed = (await http.post("/v1/messages", json=ask)).json()
        assert sealed["content"][0] == {"type": "redacted_thinking", "data": "sealed"}
        assert (sealed["stop_reason"], sealed["usage"]["output_tokens"]) == ("max_tokens", None)
        called = (await http.post("/v1/messages", json=messages_body())).json()
        assert called["content"][1] == {
            "type": "tool_use",
            "id": "toolu_1",
            "name": "weather",
            "input": {"city": "Oslo"},
        }
        assert called["stop_reason"] == "tool_use"


async def test_what_a_provider_says_comes_back_from_openai_clients(routed: Routed) -> None:
    """OpenAI's fields have no place for a proof of reasoning: without it the provider refuses the next turn."""
    thought_and_called: Script = [*THOUGHT[:4], *CALLS[2:]]
    first = target(thought_and_called, thought_and_called, says("done"))
    async with routed(first) as http:
        ask = {"model": "chat", "messages": HELLO, "tools": TOOLS}
        message = (await http.post("/v1/chat/completions", json=ask)).json()["choices"][0]["message"]
        assert message["reasoning_content"] == "hm"
        chunks = events((await http.post("/v1/chat/completions", json={**ask, "stream": True})).text)
        last = chunks[-1]["choices"][0]
        assert last["finish_reason"] == "tool_calls"
        assert last["delta"]["provider_specific_fields"] == message["provider_specific_fields"]
        result = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
        await http.post("/v1/chat/completions", json={**ask, "messages": [*HELLO, message, result]})
        reasoning, text, call = first.requests[-1].messages[1].parts
        assert (reasoning.text, reasoning.signature, text.text) == ("hm", "proof", "yes")  # type: ignore[union-attr]
        assert call.provider_data == {"fam": {"proof": "of the call"}}  # type: ignore[union-attr]
        edited = {**message, "content": "something else"}
        await http.post("/v1/chat/completions", json={**ask, "messages": [*HELLO, edited, result]})
        assert first.requests[-1].messages[1].parts[-1].provider_data == {}  # type: ignore[union-attr]
        wrong = {**message, "provider_specific_fields": {"diptych": {"parts": [{"kind": "text", "chars": -1}]}}}
        told = await http.post("/v1/chat/completions", json={**ask, "messages": [*HELLO, wrong, result]})
        path = "messages[1].provider_specific_fields.diptych.parts[0].chars"
        assert (told.status_code, told.json()["error"]["param"]) == (400, path)


async def test_refusals_filters_and_missing_counts_are_told_as_they_are(routed: Routed) -> None:
    refused: Script = [Began(), Refusal("no"), Ended("content_filter")]
    async with routed(target(refused)) as http:
        chat = (await http.post("/v1/chat/completions", json={"model": "chat", "messages": HELLO})).json()
        assert chat["choices"][0]["message"] == {"role": "assistant", "content": None, "refusal": "no"}
        assert (chat["choices"][0]["finish_reason"], chat["usage"]) == ("content_filter", None)
        anthropic = (await http.post("/v1/messages", json=messages_body())).json()
        assert (anthropic["stop_reason"], anthropic["content"][0]["text"]) == ("refusal", "no")
        response = (await http.post("/v1/responses", json={"model": "chat", "input": "hi"})).json()
        assert response["output"][0]["content"] == [{"type": "refusal", "refusal": "no"}]
        assert (response["incomplete_details"], response["usage"]) == ({"reason": "content_filter"}, None)


async def test_several_choices_are_several_exchanges(routed: Routed) -> None:
    async with routed(target(says("a"), says("b"), says("c"), says("x"), says("y"))) as http:
        ask = {"model": "chat", "messages": HELLO}
        whole = await http.post("/v1/chat/completions", json={**ask, "n": 3})
        assert sorted(choice["message"]["content"] for choice in whole.json()["choices"]) == ["a", "b", "c"]
        assert whole.json()["usage"]["prompt_tokens"] == 21
        assert whole.headers["x-route-attempts"] == "3"
        chunks = events((await http.post("/v1/chat/completions", json={**ask, "n": 2, "stream": True})).text)
        ends = {c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]}
        assert ends == {0, 1}


async def test_logprobs_and_finished_parts_come_with_their_texts(routed: Routed) -> None:
    entry = {"token": "1", "logprob": -0.5, "bytes": [49], "top_logprobs": []}
    script: Script = [Began(), Logprobs([entry]), Content('{"a":1'), Content("}"), Usage(), Ended("stop")]
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with routed(target(script)) as http:
        ask = {"model": "chat", "messages": HELLO, "logprobs": True, "response_format": form}
        whole = (await http.post("/v1/chat/completions", json=ask)).json()["choices"][0]
        assert whole["logprobs"]["content"] == [entry]
        assert "a" in whole["schema_errors"][0]
        streamed = await http.post("/v1/chat/completions", json={**ask, "stream": True, "structured": True})
        chunks = [c["choices"][0] for c in events(streamed.text)]
        assert [c["logprobs"]["content"] for c in chunks if c["logprobs"]] == [[entry]]
        assert {"path": "/a", "value": 1} in [e for c in chunks for e in c["delta"].get("structured", [])]
        assert chunks[-1]["schema_errors"] == whole["schema_errors"]


async def test_hidden_reasoning_is_not_told(routed: Routed) -> None:
    async with routed(target(THOUGHT)) as http:
        ask = {"model": "chat", "messages": HELLO, "include_reasoning": False}
        message = (await http.post("/v1/chat/completions", json=ask)).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "yes", "refusal": None}


async def test_an_own_model_is_reached_by_its_name_and_through_a_route_of_it(routed: Routed) -> None:
    """A route of an own model's name stands before it."""
    routes = {MODEL: {"targets": [f"pool/{MODEL}"]}}
    async with routed(routes=routes) as http:
        ask = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "ignore_eos": True, "seed": 1}
        told = await http.post("/v1/chat/completions", json=ask)
        assert (told.status_code, told.headers["x-route-target"]) == (200, f"pool/{MODEL}")
        assert told.json()["usage"]["completion_tokens"] == 4
        completed = await http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 2})
        assert completed.status_code == 200
        assert "x-route-target" not in completed.headers
        counted = await http.post("/v1/messages/count_tokens", json={"model": MODEL, "messages": HELLO})
        assert counted.json()["input_tokens"] > 0
        lives = {life["id"]: life for life in (await http.get("/v1/requests")).json()["data"]}
        assert lives[told.headers["x-request-id"]]["num_tokens"] == 4


async def test_other_endpoints_say_where_a_route_answers(routed: Routed) -> None:
    async with routed(target(says("x"))) as http:
        asks: Sequence[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/tokenize", {"prompt": "x"}),
            ("/v1/messages/count_tokens", {"messages": HELLO}),
            ("/v1/responses/input_tokens", {"input": "x"}),
        ]
        for path, body in asks:
            told = await http.post(path, json={"model": "chat", **body})
            assert (told.status_code, "chat" in told.text) == (400, True), path
        unknown = await http.post("/v1/chat/completions", json={"model": "chart", "messages": HELLO})
        assert unknown.status_code == 404
        assert "did you mean chat" in unknown.json()["error"]["message"]


async def test_routes_are_listed_with_what_their_targets_can() -> None:
    read = GatewaySettings.model_validate({"routes": {"chat": {"targets": ["p/a", f"pool/{MODEL}"]}}})
    async with (
        front_door(gateway=read, targets=[target(says("x"))]) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        cards = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
        assert (cards["chat"]["owned_by"], cards[MODEL]["owned_by"]) == ("gateway", "diptych")
        assert "image" in cards["chat"]["capabilities"]["modalities"]["input"]
        assert cards["chat"]["capabilities"]["targets"] == ["p/a", f"pool/{MODEL}"]
        assert (await http.get("/v1/models/chat")).json() == cards["chat"]
        theirs = await http.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
        assert "chat" in [card["id"] for card in theirs.json()["data"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_by_id_and_going_away_end_the_providers_call(routed: Routed, stream: bool) -> None:
    hanging = target([Began(), Content("a"), Wait(HANG)])
    async with routed(hanging) as http:
        ask = {"model": "chat", "messages": HELLO, "stream": stream}
        task = asyncio.create_task(http.post("/v1/chat/completions", json=ask))
        await until(lambda: hanging.open == 1)
        (life,) = [one for one in (await http.get("/v1/requests")).json()["data"] if not one["is_over"]]
        assert life["model"] == "chat"
        await http.post(f"/v1/requests/{life['id']}/cancel")
        told = await task
        assert "cancelled" in told.text
        await until(lambda: hanging.open == 0)
        over = await last_life(http)
        assert (over["id"], over["state"]) == (life["id"], "cancelled")
        task = asyncio.create_task(http.post("/v1/chat/completions", json=ask))
        await until(lambda: hanging.open == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: hanging.open == 0)


async def test_a_requests_own_times_hold(routed: Routed) -> None:
    async with routed(target([Wait(HANG)])) as http:
        for name, code in (("timeout_s", "deadline_exceeded"), ("first_token_timeout_s", "first_token_timeout")):
            for stream in (False, True):
                ask = {"model": "chat", "messages": HELLO, name: 0.05, "stream": stream}
                told = await http.post("/v1/chat/completions", json=ask)
                assert (told.status_code, told.json()["error"]["code"]) == (504, code)


async def test_responses_are_stored_go_on_and_work_in_the_background(routed: Routed) -> None:
    async with routed(target(says("one"), says("two"), CALLS)) as http:
        first = (await http.post("/v1/responses", json={"model": "chat", "input": "hi"})).json()
        assert first["output"][0]["content"][0]["text"] == "one"
        again = {"model": "chat", "input": "and", "previous_response_id": first["id"], "background": True}
        second = (await http.post("/v1/responses", json=again)).json()
        told: dict[str, Any] = {}
        while told.get("status") in (None, "queued", "in_progress"):
            told = (await http.get(f"/v1/responses/{second['id']}")).json()
        assert told["output"][0]["content"][0]["text"] == "two"
        streamed = await http.post("/v1/responses", json={"model": "chat", "input": "x", "stream": True})
        assert streamed.headers["x-route-target"] == "p/a"
        body = events(streamed.text)[-1]["response"]
        assert [item["type"] for item in body["output"]] == ["message", "function_call"]
        wrong = await http.post("/v1/responses", json={"model": "chat", "input": "x", "truncation": "auto"})
        assert wrong.json()["error"]["param"] == "truncation"


async def test_errors_name_fields_as_the_endpoint_does(routed: Routed) -> None:
    lacking = ScriptedTarget("p/a", [says("x")], cannot="p/a cannot do what stop asks for")
    async with routed(lacking) as http:
        told = await http.post("/v1/messages", json=messages_body(stop_sequences=["x"]))
        assert told.status_code == 400
        assert "stop_sequences asks for" in told.json()["error"]["message"]


async def test_kept_answers_say_so(routed: Routed) -> None:
    routes = {"chat": {"targets": ["p/a"], "cache": {"ttl_s": 60}}}
    once = target(says("kept"))
    async with routed(once, routes=routes) as http:
        ask = {"model": "chat", "messages": HELLO, "temperature": 0}
        assert (await http.post("/v1/chat/completions", json=ask)).headers["x-cache"] == "miss"
        for more in ({}, {"stream": True}):
            told = await http.post("/v1/chat/completions", json={**ask, **more})
            assert told.headers["x-cache"] == "hit"
            assert "kept" in told.text
        assert len(once.requests) == 1


async def test_other_servers_fields_are_left_alone() -> None:
    body = {"model": "m", "messages": [{"role": "assistant", "content": "x", "provider_specific_fields": {"a": 1}}]}
    assert parse_chat(json.dumps(body).encode()).messages[0].content == "x"


async def test_redacted_thinking_goes_to_routes_and_not_to_own_models(routed: Routed) -> None:
    """Its maker refuses the next turn without it; nobody else can read it."""
    first = target(says("x"))
    async with routed(first) as http:
        block = {"type": "redacted_thinking", "data": "sealed"}
        turns = [*HELLO, {"role": "assistant", "content": [block, {"type": "text", "text": "a"}]}, *HELLO]
        told = await http.post("/v1/messages", json=messages_body(messages=turns))
        assert (told.status_code, first.requests[-1].messages[1].parts[0].is_redacted) == (200, True)  # type: ignore[union-attr]
        told = await http.post("/v1/messages", json=messages_body(messages=turns, model=MODEL))
        assert told.json()["error"]["details"]["param"] == "messages[1].content[0]"


async def test_proofs_come_back_with_a_responses_items(routed: Routed) -> None:
    """Anthropic refuses the turn behind a call when the thinking before it lacks its signature."""
    script: Script = [Began(), Signature("sealed", True), *THOUGHT[1:3], *CALLS[2:]]
    first = target(script, script, says("x"))
    async with routed(first) as http:
        tool = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
        ask = {"model": "chat", "input": "hi", "tools": [tool]}
        result = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
        one = (await http.post("/v1/responses", json=ask)).json()
        goes_on = {**ask, "input": [result], "previous_response_id": one["id"]}
        sent_back = {**ask, "store": False, "input": [{"role": "user", "content": "hi"}, *one["output"], result]}
        for more in (goes_on, sent_back):
            assert (await http.post("/v1/responses", json=more)).status_code == 200
            redacted, thought, call = first.requests[-1].messages[1].parts
            assert (redacted.text, redacted.is_redacted) == ("sealed", True)  # type: ignore[union-attr]
            assert (thought.text, thought.signature) == ("hm", "proof")  # type: ignore[union-attr]
            assert call.name == "weather"  # type: ignore[union-attr]


async def test_what_is_left_of_limits_is_told_with_answers_and_refusals(routed: Routed) -> None:
    limits = {"few": {"tenant": "*", "requests_per_minute": 2, "input_tokens_per_minute": 1000}}
    async with routed(target(says("x")), limits=limits) as http:
        ask = {"model": "chat", "messages": HELLO}
        told = await http.post("/v1/chat/completions", json=ask)
        assert told.headers["x-ratelimit-remaining-requests"] == "1"
        assert told.headers["x-ratelimit-limit-input-tokens"] == "1000"
        await http.post("/v1/chat/completions", json=ask)
        refused = await http.post("/v1/chat/completions", json=ask)
        assert (refused.status_code, refused.headers["x-ratelimit-remaining-requests"]) == (429, "0")


async def test_of_two_limits_the_tighter_one_is_told() -> None:
    """A client that waits by the looser one is refused."""
    remaining = b"x-ratelimit-remaining-requests"
    loose, tight = [(remaining, b"50"), (b"x", b"1")], [(remaining, b"3")]
    assert together(loose, tight) == [(b"x", b"1"), (remaining, b"3")]
    assert together(tight, loose) == [(remaining, b"3"), (b"x", b"1")]
    assert together([(b"y", b"")], loose) == [(b"y", b""), *loose]


async def test_batches_ask_routes_as_http_does(door: FrontDoor) -> None:
    gateway = Gateway(
        GatewaySettings.model_validate({"routes": {"chat": {"targets": ["p/a"]}}}),
        targets=[target(says("one"), says("two"))],
    )
    async with gateway:
        known = targets_of(door.router, [door.served], door.store, RoutedModels(gateway, door.router))
        asks = {
            "/v1/chat/completions": {"model": "chat", "messages": HELLO},
            "/v1/responses": {"model": "chat", "input": "hi", "store": False},
        }
        for path, ask in asks.items():
            body = json.dumps(ask).encode()
            assert known[path].check(body) == "chat"
            attempt = known[path].attempt("tenant")
            told = await known[path].answer(body, attempt, "tenant")
            assert (told["model"], attempt.was_placed, attempt.has_tokens) == ("chat", True, True)
        with pytest.raises(UnknownModel):
            known["/v1/completions"].check(json.dumps({"model": "chat", "prompt": "x"}).encode())


async def test_keys_say_whose_request_it_is_and_what_it_may_want(tmp_path: Path) -> None:
    """A client that could name its own tenant, or any target, would spend others' money."""
    shown, bound = make_key("a", tags=("x",)), make_key("b", may_override=frozenset({Override.TARGET}))
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text("\n".join(key_line(key) for _, key in (shown, bound)))
    settings = GatewaySettings.model_validate(
        {
            "routes": {"chat": {"targets": ["p/a", "q/b"], "strategy": "priority"}},
            "limits": {"few": {"tag": "x", "requests_per_minute": 1}},
        }
    )
    targets = [target(says("x")), target(says("y"), name="q/b")]
    async with (
        front_door(gateway=settings, targets=targets, keys=ApiKeys(file)) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        ask, wish = {"model": "chat", "messages": HELLO}, {"x-route-target": "q/b"}

        async def post(key: str, **headers: str) -> httpx2.Response:
            sent = {"authorization": f"Bearer {key}", **headers}
            return await http.post("/v1/chat/completions", json=ask, headers=sent)

        assert (await post(shown[0], **wish)).status_code == 403
        assert (await post(shown[0])).status_code == 200
        assert (await post(shown[0])).status_code == 429
        assert (await post(bound[0])).headers["x-route-target"] == "p/a"
        assert (await post(bound[0], **wish)).headers["x-route-target"] == "q/b"
