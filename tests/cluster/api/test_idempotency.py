"""A request with an Idempotency-Key is worked on once: retries get its answer, from whichever router they reach."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diptych.cluster.api import idempotency
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import LimitSettings
from diptych.cluster.router.life import State
from diptych.cluster.router.rig import until
from diptych.cluster.store import idempotency as records
from diptych.cluster.store.testing import temporary_store
from diptych.protos.errors import StoreUnavailable

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"model": "echo", "prompt": "hello", "max_tokens": 3}
KEY = {"Idempotency-Key": "order-7"}


def code(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_retry_gets_the_same_bytes_and_no_engine_hears_of_it(
    http: httpx2.AsyncClient, door: FrontDoor, *, stream: bool
) -> None:
    body = BODY | {"stream": stream, "n": 2, "temperature": 1}
    first = await http.post(TEXT, json=body, headers=KEY)
    orders = len(door.decode.orders)
    again = await http.post(TEXT, json=body, headers=KEY)
    assert again.status_code == first.status_code == 200
    assert again.content == first.content
    assert len(door.decode.orders) == orders
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    for name in ("content-type", "x-request-id"):
        assert again.headers[name] == first.headers[name]
    other = await http.post(TEXT, json=body, headers={"Idempotency-Key": "order-8"})
    assert other.headers["x-request-id"] != first.headers["x-request-id"]


async def test_the_key_belongs_to_a_tenant_a_path_and_a_body(http: httpx2.AsyncClient) -> None:
    """Guards against one tenant's answer for another, and against an answer to something else."""
    first = await http.post(TEXT, json=BODY, headers=KEY | {"x-tenant": "mine"})
    foreign = await http.post(TEXT, json=BODY, headers=KEY | {"x-tenant": "other"})
    assert foreign.json()["id"] != first.json()["id"]
    changed = await http.post(TEXT, json=BODY | {"max_tokens": 4}, headers=KEY | {"x-tenant": "mine"})
    assert code(changed) == (422, "idempotency_key_reused")
    assert changed.json()["error"]["param"] == "Idempotency-Key"
    chat = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
    assert code(await http.post(CHAT, json=chat, headers=KEY | {"x-tenant": "mine"})) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("key", ["", "k" * 256, "\xe9"])
async def test_a_key_that_is_none_is_refused(http: httpx2.AsyncClient, key: str) -> None:
    response = await http.post(TEXT, json=BODY, headers=[(b"idempotency-key", key.encode("latin-1"))])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_a_key_given_twice_is_refused(http: httpx2.AsyncClient) -> None:
    response = await http.post(TEXT, json=BODY, headers=[("idempotency-key", "a"), ("idempotency-key", "a")])
    assert "2 times" in response.json()["error"]["message"]


async def test_what_failed_is_worked_on_again(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    """Guards against an error, or half of a stream, that is told for a day."""
    assert (await http.post(TEXT, json=BODY | {"timeout_s": 1e-9}, headers=KEY)).status_code == 504
    assert (await http.post(TEXT, json=BODY | {"model": "nobody"}, headers=KEY)).status_code == 404
    await door.decode_alone()
    door.decode.faults.error = idempotency.InvalidRequest("the engine says no")
    door.decode.faults.error_at = 1
    broken = await http.post(TEXT, json=BODY | {"stream": True}, headers=KEY)
    assert broken.status_code == 200
    assert "the engine says no" in broken.text
    door.decode.faults.error = None
    assert (await http.post(TEXT, json=BODY, headers=KEY)).status_code == 200


async def test_while_it_is_in_work_a_retry_is_told_to_wait() -> None:
    async with front_door(step_s=0.02) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        first = asyncio.create_task(http.post(TEXT, json=BODY | {"max_tokens": 60}, headers=KEY))
        await until(lambda: door.router.in_flight != {})
        early = await http.post(TEXT, json=BODY | {"max_tokens": 60}, headers=KEY)
        assert code(early) == (409, "idempotency_key_in_use")
        assert 1 <= int(early.headers["retry-after"]) <= idempotency.LEASE_S
        answer = await first
        again = await http.post(TEXT, json=BODY | {"max_tokens": 60}, headers=KEY)
        assert again.content == answer.content


async def test_who_sends_a_key_may_leave_and_come_back() -> None:
    """Guards against work that is thrown away when a connection breaks, which is what the key was sent for."""
    async with front_door(step_s=0.01) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        body = BODY | {"max_tokens": 40, "stream": True}
        async with http.stream("POST", TEXT, json=body, headers=KEY) as stream:
            name = stream.headers["x-request-id"]
        await until(lambda: bool(door.router.requests.latest("", limit=9, state=State.FINISHED)))
        again = await http.post(TEXT, json=body, headers=KEY)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-request-id"] == name
        assert again.text.endswith("data: [DONE]\n\n")
        assert len(door.decode.orders) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_background_response_is_begun_once(monkeypatch: pytest.MonkeyPatch, *, stream: bool) -> None:
    """Guards against two responses where an engine has the first one before its answer, `queued`, is out."""
    settle = idempotency.Idempotency._settle

    async with front_door(step_s=0.02) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:

        async def late(self: idempotency.Idempotency, recording: Any) -> None:
            await until(lambda: door.router.in_flight != {} or stream)
            await settle(self, recording)

        monkeypatch.setattr(idempotency.Idempotency, "_settle", late)
        body = {"model": "echo", "input": "hello", "background": True, "max_output_tokens": 20, "stream": stream}
        first = await http.post("/v1/responses", json=body, headers=KEY)
        again = await http.post("/v1/responses", json=body, headers=KEY)
        assert again.content == first.content
        assert again.headers["idempotent-replayed"] == "true"
        await until(lambda: not door.router.in_flight)
        assert len(door.decode.orders) == 1


async def test_one_that_was_cancelled_by_its_id_begins_anew() -> None:
    async with front_door(step_s=0.02) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        body = BODY | {"max_tokens": 60}
        first = asyncio.create_task(http.post(TEXT, json=body, headers=KEY))
        await until(lambda: bool(door.router.requests.latest("", limit=9, state=State.DECODING)))
        (one,) = door.router.requests.latest("", limit=9)
        await http.post(f"/v1/requests/{one.id}/cancel")
        assert code(await first) == (499, "cancelled")
        assert (await http.post(TEXT, json=body, headers=KEY)).status_code == 200


async def test_an_answer_that_is_too_large_is_not_told_again_nor_made_again() -> None:
    limits = LimitSettings(idempotency_bytes=100)
    async with front_door(limits) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        assert (await http.post(TEXT, json=BODY, headers=KEY)).status_code == 200
        orders = len(door.decode.orders)
        again = await http.post(TEXT, json=BODY, headers=KEY)
        assert code(again) == (422, "idempotent_answer_not_kept")
        assert len(door.decode.orders) == orders


async def test_leases_are_prolonged_and_end_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a second router that takes over what the first one is still at."""
    monkeypatch.setattr(idempotency, "LEASE_S", 0.6)
    monkeypatch.setattr(idempotency, "RENEW_S", 0.1)
    async with front_door(step_s=0.02) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        body = BODY | {"max_tokens": 60}
        first = asyncio.create_task(http.post(TEXT, json=body, headers=KEY))
        await until(lambda: door.router.in_flight != {})
        while not first.done():
            early = await http.post(TEXT, json=body, headers=KEY)
            assert early.status_code in (409, 200)
        assert first.result().status_code == 200
        assert len(door.decode.orders) == 1


async def test_a_key_whose_end_could_not_be_stored_is_free_again_while_others_are_in_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a lease that is prolonged for as long as its router works on anything: the key was taken for a
    day.
    """
    monkeypatch.setattr(idempotency, "LEASE_S", 0.3)
    monkeypatch.setattr(idempotency, "RENEW_S", 0.05)
    finish = records.finish

    def broken(*args: Any) -> bool:
        raise StoreUnavailable("the disk is full")

    async with front_door(step_s=0.02) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        other = asyncio.create_task(http.post(TEXT, json=BODY | {"max_tokens": 500}, headers={"Idempotency-Key": "2"}))
        monkeypatch.setattr(records, "finish", broken)
        assert (await http.post(TEXT, json=BODY, headers=KEY)).status_code == 200
        monkeypatch.setattr(records, "finish", finish)
        async with asyncio.timeout(5):
            while (again := await http.post(TEXT, json=BODY, headers=KEY)).status_code == 409:
                pass
        assert again.status_code == 200
        assert not other.done()
        for one in door.router.requests.latest("", limit=9):
            one.cancel()
        assert code(await other) == (499, "cancelled")


async def test_a_batch_is_made_once(http: httpx2.AsyncClient) -> None:
    """The dearest of all requests: one that is sent again makes no second batch."""
    file = (await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"{}")})).json()["id"]
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    first = await http.post("/v1/batches", json=body, headers=KEY)
    again = await http.post("/v1/batches", json=body, headers=KEY)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert len((await http.get("/v1/batches")).json()["data"]) == 1


# ---- the records --------------------------------------------------------------------------------


def claim(run: str, now_ms: int = 1_000_000, **fields: Any) -> records.Claim:
    values: dict[str, Any] = {
        "tenant": "t",
        "key_sha256": "k",
        "request_sha256": "r",
        "holder": f"router-{run}",
        "run": run,
        "now_ms": now_ms,
        "lease_ms": 5000,
        "kept_s": 100,
    }
    return records.Claim(**values | fields)


async def test_a_lease_that_ran_out_is_taken_over_once_and_the_first_answer_counts_no_more() -> None:
    async with temporary_store() as store:

        async def claimed(one: records.Claim) -> object:
            return await store.write(lambda c: records.claim(c, one))

        first, second, third = claim("1"), claim("2", 1_004_999), claim("3", 1_005_000)
        assert await claimed(first) == records.Mine()
        assert await claimed(second) == records.InWork(1)
        assert await claimed(third) == records.Mine(is_again=True)
        answer = records.Answered(200, "[]", b"x")
        assert not await store.write(lambda c: records.finish(c, first, answer, 2000))
        await store.write(lambda c: records.release(c, first))
        await store.write(lambda c: records.prolong(c, "router-3", ["1", "9"], 1_200_000))
        assert await claimed(claim("4", 1_005_000)) == records.InWork(5000)
        await store.write(lambda c: records.prolong(c, "router-3", ["3"], 1_100_000))
        assert await claimed(claim("4", 1_099_000)) == records.InWork(1000)
        assert await store.write(lambda c: records.finish(c, third, answer, 2000))
        assert await claimed(claim("5", 1_200_000)) == answer
        assert await claimed(claim("6", request_sha256="other")) == records.OtherRequest()
        assert await claimed(claim("7", tenant="other")) == records.Mine()
        assert await claimed(claim("8", 2_000_000)) == records.Mine()
        assert await store.write(lambda c: records.forget_expired(c, 3000, most=9)) == 2


# ---- R04 ----------------------------------------------------------------------------------------

ROUTER = textwrap.dedent("""
    import asyncio, pathlib, sys
    from diptych.cluster.api.testing import front_door
    from diptych.cluster.store.testing import temporary_store

    async def main():
        async with temporary_store(data_dir=pathlib.Path(sys.argv[1])) as store:
            async with front_door(step_s=0.05, store=store) as door:
                print(door.listener.url, flush=True)
                await asyncio.Event().wait()

    asyncio.run(main())
""")


@pytest.fixture
async def doomed(tmp_path: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROUTER, str(tmp_path), stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    yield process, (await process.stdout.readline()).decode().strip()
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_router_is_killed_and_the_next_one_serves_the_retry_once(
    tmp_path: Path, doomed: tuple[asyncio.subprocess.Process, str]
) -> None:
    """R04: kill -9 amid the answer. The retry waits for the dead router's lease, then is answered, once for all."""
    process, url = doomed
    body = BODY | {"max_tokens": 100, "stream": True}

    async def ask_and_kill(http: httpx2.AsyncClient) -> None:
        async with http.stream("POST", url + TEXT, json=body, headers=KEY) as stream:
            async for line in stream.aiter_lines():
                if line:
                    process.send_signal(signal.SIGKILL)

    async with (
        temporary_store(data_dir=tmp_path) as store,
        front_door(store=store) as door,
        httpx2.AsyncClient(timeout=20) as http,
    ):
        with pytest.raises(httpx2.TransportError):
            await ask_and_kill(http)
        waited = []
        async with asyncio.timeout(20):
            while (reply := await http.post(door.listener.url + TEXT, json=body, headers=KEY)).status_code == 409:
                waited.append(float(reply.headers["retry-after-ms"]) / 1000)
                await asyncio.sleep(waited[-1])
        assert len(waited) <= 2
        assert sum(waited) <= idempotency.LEASE_S + 1
        assert reply.status_code == 200
        assert json.loads(reply.text.split("data: ")[1])["id"] == reply.headers["x-request-id"]
        for _ in range(3):
            again = await http.post(door.listener.url + TEXT, json=body, headers=KEY)
            assert again.content == reply.content
        assert len(door.decode.orders) == 1
        answered = door.router.metrics.registry.get_sample_value(
            "diptych_requests_total", {"model": "echo", "tenant": "other", "outcome": "ok"}
        )
        assert answered == 1
