"""Every bad input is a 4xx in OpenAI's shape over real HTTP, and the neighbours' answers do not change."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from diptych.cluster.api import chat
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import LimitSettings
from diptych.cluster.router.rig import until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
JSON = {"content-type": "application/json"}


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error object, after checking the shape that every error has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


RAW: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"null", None),
    (b'{"model":"echo","model":"echo"}', "model"),
    (b'{"model":"echo","temperature":NaN}', "temperature"),
    (b'{"model":"echo","temperature":-Infinity}', "temperature"),
    (b'{"model":"echo","temperature":1e999}', "temperature"),
    (b'{"model":"echo","stop":[NaN]}', None),
    (b'{"model":"echo","seed":' + b"9" * 5000 + b"}", None),
    (b'{"a":' + b"[" * 200_000, "a"),
    (b'{"a":' * 100_000, "a"),
    (b'{"model":"echo","messages":[{"role":"user","content":"\\ud800"}]}', None),
    (b'{"model":"\xff\xfe"}', None),
    (json.dumps(HELLO).encode("utf-16"), None),
    (b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}", "k0"),
]


@pytest.mark.parametrize(("body", "param"), RAW, ids=range(len(RAW)))
async def test_a_body_that_is_no_request_is_refused(
    http: httpx2.AsyncClient, door: FrontDoor, body: bytes, param: str | None
) -> None:
    for path in (CHAT, TEXT):
        error = error_of(await http.post(path, content=body, headers=JSON), 400)
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_request", param)
    assert door.prefill.orders == door.decode.orders == []


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"foo": 1}, "foo"),
        (CHAT, {"n": 17}, "n"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages[0].tool_call_id"),
        (CHAT, {"guided_choice": [str(i) for i in range(100_000)]}, "guided_choice"),
        (CHAT, {"chat_template_kwargs": {"colour": "red"}}, "chat_template_kwargs.colour"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (TEXT, {"prompt": "x", "guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        (TEXT, {"prompt": "x", "chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        (TEXT, {"prompt": "x", "tools": []}, "tools"),
        (CHAT, {"stop": ["x"] * 17}, "stop"),
        (TEXT, {"prompt": [1, 2.5]}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": [0, 404, 403, 10**30]}, "prompt"),
        (TEXT, {"prompt": [2**31]}, "prompt"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
        (TEXT, {"prompt": "x", "messages": []}, "messages"),
    ],
)
async def test_a_bad_field_is_refused_by_name(
    http: httpx2.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    base = HELLO if path == CHAT else {"model": "echo"}
    assert error_of(await http.post(path, json={**base, **fields}), 400)["param"] == param


async def test_an_unknown_model_is_404_and_names_the_known_ones(http: httpx2.AsyncClient) -> None:
    error = error_of(await http.post(CHAT, json={**HELLO, "model": "gpt\n5"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt?5" in error["message"]
    assert "echo" in error["message"]


async def test_a_context_too_long_is_refused_with_the_numbers(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    for body in (
        {"model": "echo", "prompt": [1] * 2048, "max_tokens": 1},
        {"model": "echo", "prompt": [1] * 2048, "max_tokens": 0, "echo": True},
        {"model": "echo", "prompt": [1] * 2049},
        {"model": "echo", "prompt": "q " * 2000},
        {"model": "echo", "prompt": "q" * 3_000_000},
    ):
        error = error_of(await http.post(TEXT, json=body), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert "2048" in error["message"]
    long = {**HELLO, "messages": [{"role": "user", "content": "q " * 2000}], "max_completion_tokens": 1}
    assert error_of(await http.post(CHAT, json=long), 400)["param"] == "messages"
    assert door.prefill.orders == door.decode.orders == []


async def test_too_many_wanted_tokens_are_blamed_on_the_field_that_wants_them(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    text = {"model": "echo", "prompt": [1] * 2000}
    error = error_of(await http.post(TEXT, json={**text, "max_tokens": 49}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "2048" in error["message"]
    assert "at most 48" in error["message"]
    for name in ("max_tokens", "max_completion_tokens"):
        error = error_of(await http.post(CHAT, json={**HELLO, name: 2048}), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", name)
        assert f"{name} asks for 2048" in error["message"]
    assert (await http.post(TEXT, json={**text, "max_tokens": 48})).status_code == 200
    assert door.decode.orders[-1].request.sampling.max_tokens == 48


async def test_a_number_of_tokens_that_nobody_asked_for_is_cut_to_what_fits(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    for num_prompt, wanted in ((2000, 16), (2040, 8), (2047, 1)):
        assert (await http.post(TEXT, json={"model": "echo", "prompt": [1] * num_prompt})).status_code == 200
        assert door.prefill.orders[-1].request.sampling.max_tokens == wanted


async def test_a_large_body_is_answered_before_it_is_read(door: FrontDoor) -> None:
    reader, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
    size = door.router.settings.limits.body_bytes + 1
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    writer.write(head.encode())
    status = await reader.readline()
    assert b" 413 " in status
    writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_10_mb_body_is_413_even_to_a_client_that_sends_it_all_first(
    http: httpx2.AsyncClient, chunked: bool
) -> None:
    async def pieces() -> Any:
        for _ in range(160):
            yield b"x" * (1 << 16)

    content = pieces() if chunked else b"x" * (10 << 20)
    error = error_of(await http.post(CHAT, content=content, headers=JSON), 413)
    assert error["code"] == "request_too_large"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_body_that_a_web_page_could_send_unasked_is_refused(http: httpx2.AsyncClient, kind: str) -> None:
    response = await http.post(CHAT, content=json.dumps(HELLO).encode(), headers={"content-type": kind})
    assert "content-type" in error_of(response, 400)["message"]


async def test_paths_and_methods_that_do_not_exist(http: httpx2.AsyncClient) -> None:
    assert error_of(await http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(await http.get("/v1/models/none"), 404)["code"] == "model_not_found"
    assert error_of(await http.get(CHAT), 405)["code"] == "method_not_allowed"
    assert (await http.post(CHAT + "/", json=HELLO)).status_code == 404
    assert "//v1/models" in error_of(await http.get(f"{http.base_url}//v1/models"), 404)["message"]
    assert len(error_of(await http.get("/" + "x" * 20_000), 404)["message"]) < 200


async def test_neighbours_are_unaffected_by_bad_requests() -> None:
    async with front_door(step_s=0.001) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        good = {**HELLO, "max_tokens": 100, "ignore_eos": True, "stream": True, "seed": 1}

        async def answer() -> str:
            """The text; how it is cut into events depends on who was busy when."""
            lines = (await http.post(CHAT, json=good)).text.split("\n\n")
            assert lines[-2] == "data: [DONE]"
            deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line[6:7] == "{"]
            return "".join(delta.get("content", "") for delta in deltas)

        alone = await answer()
        victims = [asyncio.create_task(answer()) for _ in range(8)]
        await until(lambda: len(door.decode.orders) == 9)
        for body, _ in RAW:
            assert (await http.post(CHAT, content=body, headers=JSON)).status_code == 400
        for prompt in ([-1], [2**31], [404]):
            assert (await http.post(TEXT, json={"model": "echo", "prompt": prompt})).status_code == 400
        assert [await victim for victim in victims] == [alone] * 8


async def test_a_full_router_refuses_at_once_and_says_when_to_come_back() -> None:
    async with (
        front_door(LimitSettings(max_running=1, max_waiting=1)) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        door.prefill.faults.silent = door.decode.faults.silent = True
        held = [asyncio.create_task(http.post(CHAT, json=HELLO)) for _ in range(2)]
        await until(lambda: door.router.admission.running == 1 and door.router.admission.waiting == 1)
        response = await http.post(CHAT, json=HELLO)
        assert error_of(response, 503)["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await until(lambda: door.router.admission.running == 0 and door.router.admission.waiting == 0)


async def test_a_request_deadline_is_504_and_ends_the_work_on_both_engines() -> None:
    async with (
        front_door(LimitSettings(request_timeout_s=0.2)) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        door.prefill.faults.silent = door.decode.faults.silent = True
        assert error_of(await http.post(CHAT, json=HELLO), 504)["code"] == "deadline_exceeded"
        await until(lambda: bool(door.prefill.cancels) and bool(door.decode.cancels))


async def test_an_unexpected_exception_is_a_500_without_its_text(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(body: bytes) -> None:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(chat, "parse_chat", broken)
    response = await http.post(CHAT, json=HELLO)
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    assert (await http.post(TEXT, json={"model": "echo", "prompt": "hello"})).status_code == 200
