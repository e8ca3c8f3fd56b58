"""/v1/tokenize and /v1/detokenize: vLLM's shapes, the tokens that the other endpoints compute, and strictness.

It guards against a page that counts other tokens than those a request has.
"""

from __future__ import annotations

import contextlib
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.api.testing import FrontDoor
from diptych.protos.errors import InvalidRequest
from diptych.protos.tokenize import MAX_TEXT_CHARS, MAX_TOKEN_IDS, parse_detokenize, parse_tokenize

SAID = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "looks"}}]


async def told(http: httpx2.AsyncClient, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    reply = await http.post(path, json=body)
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize("path", ["/v1/tokenize", "/tokenize"])
async def test_a_text_has_the_tokens_of_a_completion(http: httpx2.AsyncClient, door: FrontDoor, path: str) -> None:
    found = await told(http, path, {"model": "echo", "prompt": "hello world", "return_token_strs": True})
    assert found.keys() == {"count", "max_model_len", "tokens", "token_strs"}
    assert found["max_model_len"] == 2048
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    await told(http, "/v1/completions", {"model": "echo", "prompt": "hello world", "max_tokens": 1})
    assert list(door.prefill.orders[-1].request.prompt) == found["tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": TOOLS},
        {"add_generation_prompt": False},
        {"messages": [*SAID, {"role": "assistant", "content": "well"}], "continue_final_message": True},
    ],
)
async def test_a_conversation_has_the_tokens_of_a_chat(
    http: httpx2.AsyncClient, door: FrontDoor, fields: dict[str, Any]
) -> None:
    body = {"model": "echo", "messages": SAID, **fields}
    found = await told(http, "/v1/tokenize", body)
    await told(http, "/v1/chat/completions", {**body, "max_tokens": 1})
    assert list(door.prefill.orders[-1].request.prompt) == found["tokens"]
    assert found["token_strs"] is None


async def test_special_tokens_come_where_they_are_asked_for(http: httpx2.AsyncClient) -> None:
    text = {"prompt": "<|im_start|>user"}
    with_, without = [
        (await told(http, "/v1/tokenize", {**text, "add_special_tokens": flag}))["tokens"] for flag in (True, False)
    ]
    assert with_[-len(without) :] == without


async def test_what_was_tokenised_comes_back_special_tokens_too(http: httpx2.AsyncClient) -> None:
    text = "<|im_start|>user\nh\u00e9llo \U0001f600 [plain added]<|im_end|>"
    tokens = (await told(http, "/v1/tokenize", {"prompt": text, "add_special_tokens": False}))["tokens"]
    for path in ("/v1/detokenize", "/detokenize"):
        assert await told(http, path, {"tokens": tokens}) == {"prompt": text}
    many = tokens * 3000
    assert (await told(http, "/v1/detokenize", {"tokens": many}))["prompt"] == text * 3000


async def test_a_text_longer_than_the_context_is_counted(http: httpx2.AsyncClient) -> None:
    found = await told(http, "/v1/tokenize", {"prompt": "hello " * 30_000})
    assert found["count"] > found["max_model_len"]


async def test_what_it_cannot_do_is_refused_by_name(http: httpx2.AsyncClient) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
    for path, body, status, param in (
        ("/v1/tokenize", {"model": "other", "prompt": "x"}, 404, "model"),
        ("/v1/detokenize", {"model": "other", "tokens": []}, 404, "model"),
        ("/v1/detokenize", {"tokens": [294]}, 400, "tokens"),
        ("/v1/tokenize", {"messages": [{"role": "user", "content": [picture]}]}, 400, "messages[0].content[0]"),
        ("/v1/tokenize", {"prompt": "x", "chat_template": "{{ 7 }}"}, 400, "chat_template"),
        ("/v1/tokenize", {"messages": SAID, "chat_template_kwargs": {"colour": 1}}, 400, "chat_template_kwargs.colour"),
        ("/v1/tokenize", {"prompt": "x", "tools": TOOLS}, 400, "tools"),
    ):
        assert (await told(http, path, body, status))["error"]["param"] == param


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_invalid(body: bytes) -> None:
    for parse in (parse_tokenize, parse_detokenize):
        with contextlib.suppress(InvalidRequest):
            parse(body)


def test_limits_are_the_last_that_is_taken() -> None:
    parse_tokenize(b'{"prompt":"' + b"x" * MAX_TEXT_CHARS + b'"}')
    parse_detokenize(b'{"tokens":[' + b",".join([b"1"] * MAX_TOKEN_IDS) + b"]}")
    with pytest.raises(InvalidRequest, match=str(MAX_TEXT_CHARS)):
        parse_tokenize(b'{"prompt":"' + b"x" * (MAX_TEXT_CHARS + 1) + b'"}')
    with pytest.raises(InvalidRequest, match=str(MAX_TOKEN_IDS)):
        parse_detokenize(b'{"tokens":[' + b",".join([b"1"] * (MAX_TOKEN_IDS + 1)) + b"]}")
