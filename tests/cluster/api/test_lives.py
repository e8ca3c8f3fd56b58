"""What clients are told of their requests, and that they can end them by id, from reading to the last token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import LimitSettings
from diptych.cluster.router.life import State
from diptych.cluster.router.rig import until

TEXT = "/v1/completions"
BODY = {"model": "echo", "prompt": "hello", "max_tokens": 3}


def tracked(door: FrontDoor, state: State) -> list[str]:
    return [one.id for one in door.router.requests.latest("", limit=100, state=state)]


async def get(http: httpx2.AsyncClient, path: str, **headers: str) -> Any:
    response = await http.get(path, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answered_request_is_told_by_the_answers_id(http: httpx2.AsyncClient, *, stream: bool) -> None:
    answer = await http.post(TEXT, json=BODY | {"n": 2, "stream": stream})
    name = answer.headers["x-request-id"]
    assert name in answer.text
    told = await get(http, f"/v1/requests/{name}")
    assert (told["state"], told["is_over"], told["error"]) == ("finished", True, None)
    assert (told["model"], told["endpoint"], told["num_tokens"]) == ("echo", TEXT, 6)
    assert [choice["tokens"] for choice in told["choices"]] == [3, 3]
    placed = told["choices"][0]["placements"][0]
    assert (placed["prefill_engine"], placed["decode_engine"], placed["path"]) == ("prefill-0", "decode-0", "pd")
    assert {"received", "queued", "placed", "decoding"} <= set(told["choices"][0]["seconds"])


@pytest.mark.parametrize(
    ("body", "state", "code"),
    [
        (BODY | {"nonsense": 1}, "refused", "invalid_request"),
        (BODY | {"model": "nobody"}, "refused", "model_not_found"),
        (BODY | {"timeout_s": 1e-9}, "failed", "deadline_exceeded"),
        (BODY | {"first_token_timeout_s": 1e-9}, "failed", "first_token_timeout"),
    ],
)
async def test_a_refused_request_has_an_id_and_a_life_too(
    http: httpx2.AsyncClient, body: dict[str, Any], state: str, code: str
) -> None:
    answer = await http.post(TEXT, json=body)
    told = await get(http, f"/v1/requests/{answer.headers['x-request-id']}")
    assert (told["state"], told["error"]["code"]) == (state, code)
    assert told["error"]["message"] == answer.json()["error"]["message"]


async def test_a_body_that_is_too_large_has_one_as_well() -> None:
    async with (
        front_door(LimitSettings(body_bytes=100)) as door,
        httpx2.AsyncClient(base_url=door.listener.url) as http,
    ):
        answer = await http.post(TEXT, json=BODY | {"prompt": "x" * 200})
        assert answer.status_code == 413
        told = await get(http, f"/v1/requests/{answer.headers['x-request-id']}")
        assert (told["state"], told["error"]["code"]) == ("refused", "request_too_large")


async def test_another_tenants_request_does_not_exist(http: httpx2.AsyncClient) -> None:
    """Guards against ids that open what other tenants did."""
    answer = await http.post(TEXT, json=BODY, headers={"x-tenant": "mine"})
    name = answer.headers["x-request-id"]
    assert (await get(http, f"/v1/requests/{name}", **{"x-tenant": "mine"}))["id"] == name
    for headers in ({"x-tenant": "other"}, {}):
        for method, path in (("GET", f"/v1/requests/{name}"), ("POST", f"/v1/requests/{name}/cancel")):
            refused = await http.request(method, path, headers=headers)
            never = await http.request(method, path.replace(name, "cmpl-0"), headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "request_not_found")
            assert refused.text == never.text.replace("cmpl-0", name)
        assert (await get(http, "/v1/requests", **headers))["data"] == []


async def test_the_list_is_bounded_and_newest_first(http: httpx2.AsyncClient) -> None:
    names = [(await http.post(TEXT, json=BODY)).headers["x-request-id"] for _ in range(3)]
    bad = (await http.post(TEXT, json=BODY | {"model": "nobody"})).headers["x-request-id"]
    told = (await get(http, "/v1/requests"))["data"]
    assert [one["id"] for one in told] == [bad, *reversed(names)]
    assert [one["id"] for one in (await get(http, "/v1/requests?limit=2"))["data"]] == [bad, names[-1]]
    told = (await get(http, "/v1/requests?state=finished&limit=1"))["data"]
    assert [one["id"] for one in told] == [names[-1]]
    for query in ("limit=1&limit=2", "limit=0", "limit=101", "limit=x", "limit=%C2%B2", "state=nowhere", "after=x"):
        refused = await http.get(f"/v1/requests?{query}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, query.partition("=")[0])


@pytest.fixture
async def slow() -> AsyncIterator[tuple[FrontDoor, httpx2.AsyncClient]]:
    async with front_door(step_s=0.02) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        yield door, http


async def test_a_stream_that_is_cancelled_ends_with_the_error(slow: tuple[FrontDoor, httpx2.AsyncClient]) -> None:
    door, http = slow
    async with http.stream("POST", TEXT, json=BODY | {"max_tokens": 1500, "stream": True}) as stream:
        name = stream.headers["x-request-id"]
        lines = stream.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        cancelled = (await http.post(f"/v1/requests/{name}/cancel")).json()
        assert (cancelled["state"], cancelled["is_over"], cancelled["is_cancelled"]) == ("cancelled", True, True)
        rest = [line async for line in lines if line]
    last = json.loads(rest[-1].removeprefix("data: "))
    assert last["error"]["code"] == "cancelled"
    assert "[DONE]" not in rest[-1]
    again = (await http.post(f"/v1/requests/{name}/cancel")).json()
    assert again == cancelled
    await until(lambda: not door.decode.open_orders and not door.prefill.open_orders)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_whole_answer_that_is_cancelled_is_a_499(slow: tuple[FrontDoor, httpx2.AsyncClient], n: int) -> None:
    door, http = slow
    answer = asyncio.create_task(http.post(TEXT, json=BODY | {"max_tokens": 1500, "n": n}))
    await until(lambda: bool(tracked(door, State.DECODING)))
    (name,) = tracked(door, State.DECODING)
    told = await get(http, f"/v1/requests/{name}")
    assert not told["is_over"]
    assert told["choices"][0]["seconds"]["queued"] >= 0
    await http.post(f"/v1/requests/{name}/cancel")
    response = await answer
    assert (response.status_code, response.json()["error"]["code"]) == (499, "cancelled")
    assert response.headers["x-request-id"] == name
    assert (await get(http, f"/v1/requests/{name}"))["error"]["code"] == "cancelled"
    await until(lambda: not door.decode.open_orders and not door.prefill.open_orders)


async def test_a_request_that_is_still_read_can_be_cancelled(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    """Guards against a cancel that only requests in the router hear of."""
    cancelled = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        data = json.dumps(BODY).encode()
        yield data[:10]
        await cancelled.wait()
        yield data[10:]

    answer = asyncio.create_task(http.post(TEXT, content=slowly(), headers={"content-type": "application/json"}))
    await until(lambda: bool(tracked(door, State.RECEIVED)))
    (name,) = tracked(door, State.RECEIVED)
    told = asyncio.create_task(http.post(f"/v1/requests/{name}/cancel"))
    await until(lambda: door.router.requests.latest("", limit=1)[0].interrupt is not None)
    cancelled.set()
    assert (await answer).json()["error"]["code"] == "cancelled"
    assert (await told).json()["state"] == "cancelled"
    assert not door.decode.orders


async def test_one_that_is_done_stays_as_it_ended(http: httpx2.AsyncClient) -> None:
    name = (await http.post(TEXT, json=BODY)).headers["x-request-id"]
    before = await get(http, f"/v1/requests/{name}")
    assert (await http.post(f"/v1/requests/{name}/cancel")).json() == before
    assert before["state"] == "finished"


async def test_a_client_that_leaves_leaves_a_cancelled_request(slow: tuple[FrontDoor, httpx2.AsyncClient]) -> None:
    door, http = slow
    async with http.stream("POST", TEXT, json=BODY | {"max_tokens": 1500, "stream": True}) as stream:
        name = stream.headers["x-request-id"]
    await until(lambda: bool(tracked(door, State.CANCELLED)))
    told = await get(http, f"/v1/requests/{name}")
    assert told["error"] == {"code": "cancelled", "message": "the client went away"}


async def test_a_full_router_refuses_before_a_prompt_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against templates and tokenizers that work for requests which nobody has room for."""
    limits = LimitSettings(max_running=1, max_waiting=0)
    async with (
        front_door(limits, step_s=0.02) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        first = asyncio.create_task(http.post(TEXT, json=BODY | {"max_tokens": 100}))
        await until(lambda: bool(tracked(door, State.DECODING)))
        monkeypatch.setattr(type(door.served.renderer), "encode", None)
        refused = await http.post(TEXT, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 1000
        told = await get(http, f"/v1/requests/{refused.headers['x-request-id']}")
        assert (told["state"], told["choices"]) == ("refused", [])
        counted = {"model": "echo", "tenant": "other", "outcome": "overloaded"}
        assert door.router.metrics.registry.get_sample_value("diptych_requests_total", counted) == 1
        assert (await first).status_code == 200
