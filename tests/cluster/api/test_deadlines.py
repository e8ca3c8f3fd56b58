"""A deadline counts from the request's head: slow bodies, templates and tokenizers take of it; engines hear nothing."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import httpx2
import pytest

from diptych.cluster.api.render import Renderer
from diptych.cluster.api.testing import FrontDoor
from diptych.cluster.router.rig import until

TEXT = "/v1/completions"
BODY = {"model": "echo", "prompt": "hello", "max_tokens": 3, "timeout_s": 20}


class Clock:
    """The router's: real time, and what a test lets pass besides."""

    passed_s = 0.0
    is_read = False

    def __call__(self) -> float:
        self.is_read = True
        return time.monotonic() + self.passed_s


@pytest.fixture
def clock(door: FrontDoor) -> Clock:
    door.router.clock = clock = Clock()
    return clock


@pytest.mark.parametrize(("body_s", "status"), [(1, 200), (30, 504)])
async def test_the_time_that_a_body_takes_counts(
    http: httpx2.AsyncClient, door: FrontDoor, clock: Clock, body_s: float, status: int
) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        data = json.dumps(BODY).encode()
        yield data[:10]
        await until(lambda: clock.is_read)  # the head is there
        clock.passed_s = body_s
        yield data[10:]

    response = await http.post(TEXT, content=slowly(), headers={"content-type": "application/json"})
    assert response.status_code == status
    assert bool(door.decode.orders) == (status == 200)


async def test_the_time_that_the_tokenizer_takes_counts(
    http: httpx2.AsyncClient, door: FrontDoor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Renderer.encode

    async def slow(self: Renderer, text: str, *, add_special: bool, max_tokens: int, param: str) -> tuple[int, ...]:
        clock.passed_s += 30
        return await encode(self, text, add_special=add_special, max_tokens=max_tokens, param=param)

    monkeypatch.setattr(Renderer, "encode", slow)
    response = await http.post(TEXT, json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"  # the official clients asked three times, each in full
    assert not door.decode.orders
    assert not door.prefill.orders
