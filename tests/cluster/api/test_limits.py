"""Limits of keys, tenants and addresses: how many pass, what a refusal tells, and that nothing is held afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.api.access import GuardedRoute
from diptych.cluster.api.app import create_app
from diptych.cluster.api.limits import (
    FAILED_ATTEMPTS_PER_MINUTE,
    MAX_ADDRESSES,
    MAX_METERS,
    Bucket,
    Limiter,
    Visit,
    duration,
)
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import TenantSettings
from diptych.cluster.keys import ApiKeys, Key, make_key, row_of
from diptych.cluster.store import keys as rows
from diptych.cluster.store.testing import temporary_store
from diptych.protos.errors import RateLimited

ASK: dict[str, Any] = {"model": "echo", "prompt": "hello world", "max_tokens": 3}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "k", **limits: int) -> Key:
    return Key(id=name, sha256="0" * 64, tenant="a", **limits)  # type: ignore[arg-type]


def come(limiter: Limiter, of: Key | None, tenant: str = "a") -> Visit | RateLimited | None:
    visit, refusal, _ = limiter.admit(of, tenant)
    return visit or refusal


# ---- buckets ----


@settings(max_examples=200)
@given(st.integers(1, 600), st.lists(st.floats(0, 90), min_size=1, max_size=400))
def test_no_minute_sees_more_than_a_full_bucket_and_what_flows_in(per_minute: int, pauses: list[float]) -> None:
    """And who waits as long as he was told gets in."""
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, []
    for pause in pauses:
        now += pause
        if bucket.wait_s(now) == 0:
            bucket.take(now)
            taken.append(now)
    for begin in taken:
        assert sum(begin <= at < begin + 60 for at in taken) <= 2 * per_minute
    assert bucket.wait_s(now + bucket.wait_s(now) + 1e-6) == 0
    assert bucket.level(now + bucket.full_in_s(now) + 1e-6) == per_minute


def test_durations_are_written_as_openai_does() -> None:
    written = {
        0: "0ms",
        0.02: "20ms",
        0.0201: "21ms",
        1: "1s",
        1.5: "1.5s",
        59.999: "59.999s",
        60: "1m0s",
        360.2: "6m1s",
    }
    assert {seconds: duration(seconds) for seconds in written} == written


# ---- the limiter ----


def test_a_key_without_limits_costs_nothing() -> None:
    limiter = Limiter({"b": TenantSettings(weight=2)})
    assert limiter.admit(key(), "a") == (None, None, [])
    assert limiter.admit(None, "b") == (None, None, [])


def test_the_wait_that_is_told_is_the_wait() -> None:
    clock = Clock()
    limiter = Limiter({}, clock)
    limited = key(requests_per_minute=30)
    assert all(isinstance(come(limiter, limited), Visit) for _ in range(30))
    refusal = come(limiter, limited)
    assert isinstance(refusal, RateLimited)
    assert refusal.retry_after_s == pytest.approx(2.0)
    clock.now += refusal.retry_after_s
    assert isinstance(come(limiter, limited), Visit)
    assert isinstance(come(limiter, limited), RateLimited)


def test_who_is_refused_for_one_limit_pays_nothing_of_the_other() -> None:
    clock = Clock()
    limiter = Limiter({"a": TenantSettings(requests_per_minute=2)}, clock)
    limited = key(concurrency=1, requests_per_minute=100)
    first = come(limiter, limited)
    assert isinstance(first, Visit)
    for _ in range(5):
        assert isinstance(come(limiter, limited), RateLimited)
    first.leave()
    second = come(limiter, limited)
    assert isinstance(second, Visit), "the tenant's bucket had one left"
    second.leave()
    assert isinstance(come(limiter, limited), RateLimited)
    told = dict(limiter.admit(limited, "a")[2])
    assert (told[b"x-ratelimit-limit-requests"], told[b"x-ratelimit-remaining-requests"]) == (b"2", b"0")


def test_all_keys_of_a_tenant_share_its_limits_and_no_other_tenant_does() -> None:
    limiter = Limiter({"a": TenantSettings(concurrency=2)}, Clock())
    visits = [come(limiter, key(name)) for name in ("x", "y")]
    assert all(isinstance(visit, Visit) for visit in visits)
    assert isinstance(come(limiter, key("z")), RateLimited)
    assert isinstance(come(limiter, None), RateLimited)
    assert come(limiter, key("z"), tenant="b") is None


def test_the_wait_for_a_place_follows_the_requests_that_were_seen() -> None:
    clock = Clock()
    limiter = Limiter({}, clock)
    limited = key(concurrency=2)
    for _ in range(60):
        visit = come(limiter, limited)
        assert isinstance(visit, Visit)
        clock.now += 8.0
        visit.leave()
    assert all(isinstance(come(limiter, limited), Visit) for _ in range(2))
    refusal = come(limiter, limited)
    assert isinstance(refusal, RateLimited)
    assert refusal.retry_after_s == pytest.approx(4.0, rel=0.01)


def test_a_limit_that_was_changed_counts_from_the_next_request_on() -> None:
    limiter = Limiter({}, Clock())
    assert isinstance(come(limiter, key(requests_per_minute=1)), Visit)
    assert isinstance(come(limiter, key(requests_per_minute=1)), RateLimited)
    assert isinstance(come(limiter, key(requests_per_minute=5)), Visit)


def test_what_is_remembered_is_bounded_and_no_limit_is_forgotten_while_it_holds() -> None:
    clock = Clock()
    limiter = Limiter({}, clock)
    busy = key("busy", concurrency=1)
    assert isinstance(come(limiter, busy), Visit)
    for number in range(MAX_METERS + 500):
        visit = come(limiter, key(f"k{number}", concurrency=1))
        assert isinstance(visit, Visit)
        visit.leave()
    assert len(limiter._meters) <= MAX_METERS + 1
    assert isinstance(come(limiter, busy), RateLimited)
    for number in range(MAX_ADDRESSES + 500):
        limiter.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(limiter._failed) <= MAX_ADDRESSES


@pytest.mark.parametrize(
    ("first", "second", "are_one"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("", "", True),
    ],
)
def test_failed_attempts_count_by_address(first: str, second: str, are_one: bool) -> None:
    """Of IPv6 by network: one customer has 2^64 addresses."""
    limiter = Limiter({}, Clock())
    assert [limiter.failed(first) for _ in range(FAILED_ATTEMPTS_PER_MINUTE)] == [None] * FAILED_ATTEMPTS_PER_MINUTE
    assert (limiter.failed(second) is not None) is are_one


# ---- over HTTP ----


@asynccontextmanager
async def limited_door(
    made: dict[str, tuple[str, Key]], step_s: float = 0.0
) -> AsyncIterator[tuple[FrontDoor, httpx2.AsyncClient]]:
    async with temporary_store() as store:
        for _, one in made.values():
            await store.write(lambda connection, one=one: rows.add(connection, row_of(one)))
        async with (
            front_door(keys=ApiKeys(None, store), store=store, step_s=step_s) as door,
            httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
        ):
            yield door, http


def bearer(shown: str) -> dict[str, str]:
    return {"authorization": f"Bearer {shown}"}


async def test_requests_a_minute_over_http() -> None:
    """Only requests that make work count, and a refusal tells when to come again."""
    made = {"a": make_key("a", requests_per_minute=3), "b": make_key("a")}
    async with limited_door(made) as (door, http):
        mine = bearer(made["a"][0])
        for left in (2, 1, 0):
            assert (await http.get("/v1/models", headers=mine)).status_code == 200
            answer = await http.post("/v1/completions", json=ASK, headers=mine)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        orders = len(door.decode.orders)
        refused = await http.post("/v1/completions", json=ASK, headers=mine)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(door.decode.orders) == orders
        assert (await http.get("/v1/models", headers=mine)).status_code == 200
        free = await http.post("/v1/completions", json=ASK, headers=bearer(made["b"][0]))
        assert free.status_code == 200
        assert "x-ratelimit-limit-requests" not in free.headers
        page = door.router.metrics.render().decode()
        assert 'diptych_listener_refused_total{code="rate_limit_exceeded"} 1.0' in page


async def test_a_stream_tells_what_is_left_too() -> None:
    made = {"a": make_key("a", requests_per_minute=3)}
    streamed, mine = ASK | {"stream": True}, bearer(made["a"][0])
    async with (
        limited_door(made) as (_, http),
        http.stream("POST", "/v1/completions", json=streamed, headers=mine) as answer,
    ):
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"
        assert b"[DONE]" in b"".join([piece async for piece in answer.aiter_bytes()])


async def test_places_are_given_back_however_a_request_ends() -> None:
    """Whole, streamed, refused for its body, left by its client amid the answer."""
    made = {"a": make_key("a", concurrency=1)}
    async with limited_door(made, step_s=0.01) as (_, http):
        mine = bearer(made["a"][0])
        long = ASK | {"max_tokens": 500, "stream": True, "ignore_eos": True}
        async with http.stream("POST", "/v1/completions", json=long, headers=mine) as answer:
            assert answer.status_code == 200
            await anext(answer.aiter_bytes())
            refused = await http.post("/v1/completions", json=ASK, headers=mine)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
        async with asyncio.timeout(10):
            while (await http.post("/v1/completions", json=ASK, headers=mine)).status_code == 429:
                continue
        for body, status in ((ASK | {"prompt": None}, 400), (ASK | {"model": "none"}, 404), (ASK, 200)):
            for _ in range(3):
                assert (await http.post("/v1/completions", json=body, headers=mine)).status_code == status


async def test_a_body_that_is_refused_is_not_read() -> None:
    made = {"a": make_key("a", requests_per_minute=1)}
    async with limited_door(made) as (door, http):
        mine = bearer(made["a"][0])
        assert (await http.post("/v1/completions", json=ASK, headers=mine)).status_code == 200
        reader, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\ncontent-length: 4000000\r\n\r\n{"
            % made["a"][0].encode()
        )
        async with asyncio.timeout(1.5):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        writer.close()


async def test_openai_s_client_knows_the_refusal() -> None:
    made = {"a": make_key("a", requests_per_minute=1)}
    async with (
        limited_door(made) as (door, _),
        openai.AsyncOpenAI(base_url=f"{door.listener.url}/v1", api_key=made["a"][0], max_retries=0) as client,
    ):
        await client.completions.create(**ASK)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(**ASK)
        assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "rate_limit_error")


async def test_a_hundred_wrong_keys_a_minute_and_the_next_gets_429() -> None:
    """Row S23. A good key from the same address still opens: behind a proxy many clients have one address."""
    made = {"a": make_key("a")}
    async with limited_door(made) as (_, http):
        wrong = [(await http.get("/v1/models", headers=bearer(make_key("a")[0]))).status_code for _ in range(130)]
        assert wrong[:FAILED_ATTEMPTS_PER_MINUTE] == [401] * FAILED_ATTEMPTS_PER_MINUTE
        assert 429 in wrong[FAILED_ATTEMPTS_PER_MINUTE:]
        refused = await http.get("/v1/models", headers=bearer("' OR 1=1 --"))
        assert refused.status_code in (401, 429)
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers=bearer(made["a"][0]))).status_code == 200


async def test_cancelling_is_never_limited(tmp_path: Path) -> None:
    """Who has used up all places must be able to free one."""
    async with temporary_store() as store, front_door(store=store) as door:
        routes = create_app(door.router, [door.served], ApiKeys(None, store), store=store).routes
        for route in routes:
            assert isinstance(route, GuardedRoute)
            assert not (route._is_metered and route.path.endswith("/cancel"))
        metered = {route.path for route in routes if isinstance(route, GuardedRoute) and route._is_metered}
        assert {"/v1/chat/completions", "/v1/completions"} <= metered
        assert not {"/v1/models", "/health"} & metered
