"""Background responses: they go on without their client, tell their events from any number on, and end honestly.

Guards against work that nobody can stop, events that are told twice or never, and a response that says it is in
progress for ever because the router that worked on it is gone. Two front doors on one store stand for two routers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diptych.cluster.api import responses_background
from diptych.cluster.api.responses_kept import KeptResponses
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import ResponsesSettings
from diptych.cluster.router.rig import until
from diptych.cluster.store.database import Store
from diptych.cluster.store.testing import temporary_store
from diptych.protos.errors import EngineError, Overloaded
from diptych.protos.responses_testing import EventReader

PATH = "/v1/responses"
Routers = tuple[FrontDoor, FrontDoor, httpx2.AsyncClient, httpx2.AsyncClient]


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "input": "hello", "background": True, **fields}


LONG = {"max_output_tokens": 1900}  # with steps of 10 ms much longer than any test


@pytest.fixture
async def slow() -> AsyncIterator[tuple[FrontDoor, httpx2.AsyncClient]]:
    """Whose answers do not end by themselves: it repeats a prompt without end tokens."""
    async with (
        front_door(template="{{ messages[-1]['content'] }}", step_s=0.01) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        yield door, http


@pytest.fixture
async def routers() -> AsyncIterator[Routers]:
    async with AsyncExitStack() as stack:
        settings = {"template": "{{ messages[-1]['content'] }}", "step_s": 0.01}
        one = await stack.enter_async_context(front_door(**settings))  # type: ignore[arg-type]
        other = await stack.enter_async_context(front_door(store=one.store, **settings))  # type: ignore[arg-type]
        clients = [
            await stack.enter_async_context(httpx2.AsyncClient(base_url=door.listener.url, timeout=20))
            for door in (one, other)
        ]
        yield one, other, clients[0], clients[1]


async def begin(http: httpx2.AsyncClient, **fields: Any) -> str:
    reply = await http.post(PATH, json=ask(**fields))
    assert reply.status_code == 200, reply.text
    assert reply.json()["status"] == "queued"
    return str(reply.json()["id"])


async def get(http: httpx2.AsyncClient, name: str) -> dict[str, Any]:
    reply = await http.get(f"{PATH}/{name}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def over(
    http: httpx2.AsyncClient, name: str, before: tuple[str, ...] = ("queued", "in_progress")
) -> dict[str, Any]:
    """Once its status is none of `before`."""
    async with asyncio.timeout(20):
        while (body := await get(http, name))["status"] in before:  # noqa: ASYNC110  as clients do it
            await asyncio.sleep(0.01)
    return body


async def events(http: httpx2.AsyncClient, name: str, after: int | None = None) -> list[dict[str, Any]]:
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    return told((await http.get(f"{PATH}/{name}", params=query)).text)


def told(text: str) -> list[dict[str, Any]]:
    return [json.loads(part.split("\ndata: ")[1]) for part in text.split("\n\n") if part]


def ended(found: list[dict[str, Any]]) -> dict[str, Any]:
    reader = EventReader()
    for event in found:
        reader.take(event)
    assert reader.last is not None
    return dict(reader.last)


async def test_it_is_done_without_its_client(slow: tuple[FrontDoor, httpx2.AsyncClient]) -> None:
    door, http = slow
    name = await begin(http, max_output_tokens=5)
    body = await over(http, name)
    assert (body["status"], body["background"], body["usage"]["output_tokens"]) == ("incomplete", True, 5)
    assert (await http.get(f"/v1/requests/{name}")).json()["state"] == "finished"
    assert not door.router.in_flight
    more = await http.post(PATH, json=ask(previous_response_id=name, background=False, max_output_tokens=2))
    assert more.json()["previous_response_id"] == name


async def test_a_stream_goes_on_behind_any_event_while_it_is_made_and_after(routers: Routers) -> None:
    _, _, http, other = routers
    whole: list[dict[str, Any]] = []
    async with http.stream("POST", PATH, json=ask(stream=True, max_output_tokens=60)) as reply:
        text = ""
        async for piece in reply.aiter_text():
            text += piece
            if text.count("output_text.delta") > 8:
                break
    whole = told(text[: text.rindex("\n\n") + 2])
    name, number = whole[0]["response"]["id"], whole[-1]["sequence_number"]
    near, far = await asyncio.gather(events(http, name, number), events(other, name, number))
    assert near == far
    whole += near
    body = ended(whole)
    assert body == await get(other, name)
    assert body["output"][0]["content"][0]["text"] == "hello" * 20
    for after in (None, 0, 5, whole[-2]["sequence_number"], whole[-1]["sequence_number"]):
        assert await events(other, name, after) == whole[0 if after is None else after + 1 :]


async def test_only_what_was_asked_for_as_a_stream_has_events(slow: tuple[FrontDoor, httpx2.AsyncClient]) -> None:
    _, http = slow
    name = await begin(http, max_output_tokens=2)
    reply = await http.get(f"{PATH}/{name}?stream=true")
    assert reply.status_code == 400
    assert "stream: true" in reply.json()["error"]["message"]


@pytest.mark.parametrize("at_owner", [True, False])
@pytest.mark.parametrize("streams", [True, False])
async def test_cancelling_ends_the_work_wherever_it_is_done(routers: Routers, *, at_owner: bool, streams: bool) -> None:
    door, _, http, other = routers
    if streams:
        async with http.stream("POST", PATH, json=ask(stream=True, **LONG)) as reply:
            first = told(await anext(reply.aiter_text()))
        name = first[0]["response"]["id"]
    else:
        name = await begin(http, **LONG)
    await over(http, name, ("queued",))
    canceller = http if at_owner else other
    answers = [await canceller.post(f"{PATH}/{name}/cancel") for _ in range(2)]
    assert [reply.json()["status"] for reply in answers] == ["cancelled", "cancelled"]
    assert answers[0].json() == answers[1].json() == await get(http, name)
    await until(lambda: not door.router.in_flight)
    assert await get(http, name) == answers[0].json()  # its worker has not written over it
    if streams:
        last = (await events(other, name))[-1]
        assert (last["type"], last["response"]) == ("response.cancelled", answers[0].json())
    (item,) = answers[0].json()["output"]  # what was made until then, whoever asked for the end
    assert item["status"] == "incomplete"
    assert ("hello" * 400).startswith(item["content"][0]["text"] or "nothing")
    assert answers[0].json()["usage"]["output_tokens"] > 0
    if streams:
        assert ended(await events(http, name)) == answers[0].json()
    refused = await http.post(PATH, json=ask(previous_response_id=name))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "previous_response_id")


async def test_cancelling_what_a_dead_router_works_on_waits_for_it_no_longer_than_it_must(
    routers: Routers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease runs yet, so that the next router cannot know: it asks, and then ends the response by itself."""
    monkeypatch.setattr(responses_background, "ENDS_IN_S", 0.2)
    door, _, http, other = routers
    monkeypatch.setattr(responses_background.BackgroundResponses, "_interrupt", lambda *_: None)  # it hears nothing
    name = await begin(http, **LONG)
    await over(http, name, ("queued",))
    reply = await other.post(f"{PATH}/{name}/cancel")
    assert (reply.json()["status"], reply.json()["output"]) == ("cancelled", [])
    monkeypatch.undo()
    await until(lambda: not door.router.in_flight)
    assert await get(http, name) == reply.json()


def counted(door: FrontDoor) -> dict[str, float]:
    """Background responses in work, and those that ended, by status."""
    registry = door.router.metrics.registry
    names = ("completed", "incomplete", "failed", "cancelled")
    found = {one: registry.get_sample_value("diptych_background_responses_total", {"status": one}) for one in names}
    in_work = registry.get_sample_value("diptych_background_responses_in_work")
    return {"in work": in_work or 0.0} | {one: number for one, number in found.items() if number}


async def test_metrics_tell_each_once_where_it_ended(routers: Routers) -> None:
    """Guards against operators who do not see that responses pile up, or that all of them fail."""
    door, other_door, http, other = routers
    await over(http, await begin(http, max_output_tokens=2))
    await until(lambda: counted(door) == {"in work": 0, "incomplete": 1})
    name = await begin(http, **LONG)
    assert counted(door) == {"in work": 1, "incomplete": 1}
    await other.post(f"{PATH}/{name}/cancel")
    await until(lambda: counted(door) == {"in work": 0, "incomplete": 1, "cancelled": 1})
    assert counted(other_door) == {"in work": 0}


async def test_a_stream_reads_no_whole_response_for_each_of_its_events(
    slow: tuple[FrontDoor, httpx2.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a long input that is read and parsed once more for every token that is told."""
    looks = 0
    find = KeptResponses.find

    async def counting(kept: KeptResponses, tenant: str, response_id: str) -> Any:
        nonlocal looks
        looks += 1
        return await find(kept, tenant, response_id)

    monkeypatch.setattr(KeptResponses, "find", counting)
    _, http = slow
    reply = await http.post(PATH, json=ask(stream=True, max_output_tokens=40))
    assert ended(told(reply.text))["usage"]["output_tokens"] == 40
    assert looks == 0


async def test_cancelling_one_that_waits_and_one_that_is_done(slow: tuple[FrontDoor, httpx2.AsyncClient]) -> None:
    door, http = slow
    door.prefill.faults.silent = door.decode.faults.silent = True  # no token ever comes
    name = await begin(http)
    assert (await get(http, name))["status"] == "queued"
    refused = await http.post(PATH, json=ask(previous_response_id=name))
    assert (refused.status_code, "still in work" in refused.text) == (400, True)
    assert (await http.post(f"{PATH}/{name}/cancel")).json()["status"] == "cancelled"
    await until(lambda: not door.router.in_flight)
    door.prefill.faults.silent = door.decode.faults.silent = False
    done = await begin(http, max_output_tokens=2)
    body = await over(http, done)
    assert (await http.post(f"{PATH}/{done}/cancel")).json() == body
    whole = (await http.post(PATH, json=ask(background=False, max_output_tokens=1))).json()
    assert (await http.post(f"{PATH}/{whole['id']}/cancel")).status_code == 400


async def test_cancelled_as_a_request_it_is_a_cancelled_response(slow: tuple[FrontDoor, httpx2.AsyncClient]) -> None:
    door, http = slow
    name = await begin(http, **LONG)
    await until(lambda: bool(door.router.in_flight))
    assert (await http.post(f"/v1/requests/{name}/cancel")).status_code == 200
    assert (await over(http, name))["status"] == "cancelled"


@pytest.mark.parametrize("at_owner", [True, False])
async def test_what_is_deleted_is_not_worked_on(routers: Routers, *, at_owner: bool) -> None:
    door, _, http, other = routers
    name = await begin(http, stream=None, **LONG)
    await until(lambda: bool(door.router.in_flight))
    assert (await (http if at_owner else other).delete(f"{PATH}/{name}")).status_code == 200
    await until(lambda: not door.router.in_flight)
    for client in (http, other):
        assert (await client.get(f"{PATH}/{name}")).status_code == 404


async def test_a_tenant_has_so_many_in_work() -> None:
    settings = ResponsesSettings(max_background=2)
    async with (
        front_door(template="{{ messages[-1]['content'] }}", step_s=0.01, responses=settings) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        names = [await begin(http, **LONG) for _ in range(2)]
        reply = await http.post(PATH, json=ask())
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(reply.headers["retry-after"]) >= 1
        assert (await http.post(PATH, json=ask(), headers={"x-tenant": "other"})).status_code == 200
        await http.post(f"{PATH}/{names[0]}/cancel")
        await begin(http, max_output_tokens=1)


async def test_a_failure_is_told_in_the_response(slow: tuple[FrontDoor, httpx2.AsyncClient]) -> None:
    door, http = slow
    await door.decode_alone()
    door.decode.faults.error = EngineError("the engine gives up")
    for error_at in (0, 5):
        door.decode.faults.error_at = error_at
        reply = await http.post(PATH, json=ask(stream=True))
        body = ended(told(reply.text))
        assert (body["status"], body["error"]["message"]) == ("failed", "the engine gives up")
        assert bool(body["output"]) == bool(error_at)


async def test_a_server_that_stops_says_so(tmp_path: Path) -> None:
    async with temporary_store(data_dir=tmp_path) as store:
        async with (
            front_door(template="{{ messages[-1]['content'] }}", step_s=0.01, store=store) as door,
            httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
        ):
            name = await begin(http, **LONG)
            await until(lambda: bool(door.router.in_flight))
        async with (
            front_door(store=store) as door,
            httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
        ):
            body = await get(http, name)
            assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
            assert "send it again" in body["error"]["message"]


async def test_events_that_the_store_cannot_take_come_later(
    slow: tuple[FrontDoor, httpx2.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    door, http = slow
    write, count = door.store.write, 0

    async def sometimes(job: Any) -> Any:
        nonlocal count
        count += 1
        if count % 3:
            raise Overloaded("the store is full")
        return await write(job)

    async with http.stream("POST", PATH, json=ask(stream=True, max_output_tokens=30)) as reply:
        stream = reply.aiter_text()
        text = await anext(stream)
        monkeypatch.setattr(door.store, "write", sometimes)
        monkeypatch.setattr(responses_background, "STORE_RETRY_S", 0.01)
        async for piece in stream:
            text += piece
    assert ended(told(text))["output"][0]["content"][0]["text"] == "hello" * 10
    assert count > 3


async def test_a_response_whose_router_is_gone_has_failed(tmp_path: Path) -> None:
    """Its lease has run out: whoever looks first says so, and nobody is told anything else after that."""
    now = 1000.0
    async with temporary_store(data_dir=tmp_path) as store:
        kept = KeptResponses(store, ResponsesSettings(lease_s=5, max_background=1), clock=lambda: now)
        name, body = await opened(kept, store)
        assert (await kept.find("a", name)).status == "queued"
        now += 6
        other, _ = await opened(kept, store, "resp_" + "2" * 24)  # what is lost takes no place
        found = await kept.find("a", name)
        assert (found.status, found.body["error"]["type"]) == ("failed", "response_lost")
        assert found.body["id"] == body["id"]
        (frame,) = [frame for _, frame in await kept.frames(name, 0, 10)]
        assert json.loads(frame.split("data: ")[1])["type"] == "response.failed"
        assert await kept.go_on(name, [(7, "late")], "completed", body) is False
        assert await kept.renew([name, other]) == {other}
        assert await kept.find("a", name) == found


async def opened(kept: KeptResponses, store: Store, name: str = "resp_" + "1" * 24) -> tuple[str, dict[str, Any]]:
    body = {"id": name, "status": "queued", "created_at": 1, "previous_response_id": None, "output": []}
    event = {"type": "response.created", "sequence_number": 0, "response": body}
    await kept.open("a", body, [], (), [event])
    return name, body
