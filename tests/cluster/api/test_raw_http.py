"""HTTP that is ambiguous, endless or not HTTP, on raw sockets: refused once, the connection closed, no request behind
it taken, no new series among the metrics (exam row S26).

It guards against a smuggled request: what a proxy in front reads as a body, and this server as a second request.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator

import httpx2
import pytest

from diptych.cluster.api.description.document import operations
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.config import LimitSettings
from diptych.cluster.router.rig import until

ASK = json.dumps({"model": "echo", "prompt": "hello", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
SECOND = HEAD + b"content-length: %d\r\n\r\n" % len(ASK) + ASK
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


# What is sent, and how many requests it may be at most.
ATTACKS: dict[str, tuple[bytes, int]] = {
    "both lengths": (HEAD + b"content-length: 5\r\n" + CHUNKED + b"0\r\n\r\n" + SECOND, 0),
    "both lengths, chunked first": (
        HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n" + SECOND,
        0,
    ),
    "chunked, misspelt": (HEAD + b"content-length: 5\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + SECOND, 0),
    "chunked twice": (HEAD + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SECOND, 0),
    "chunked and identity": (
        HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n" + SECOND,
        0,
    ),
    "a space before the colon": (HEAD + b"content-length : 0\r\n\r\n" + SECOND, 0),
    "a folded header": (HEAD + b"content-length: 0\r\n x: y\r\n\r\n" + SECOND, 1),
    "two lengths": (HEAD + b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(ASK) + ASK + SECOND, 0),
    "two equal lengths": (HEAD + b"content-length: 3\r\ncontent-length: 3\r\n\r\n{}x" + SECOND, 0),
    "a signed length": (HEAD + b"content-length: +%d\r\n\r\n" % len(ASK) + ASK, 0),
    "a long length": (HEAD + b"content-length: " + b"9" * 100 + b"\r\n\r\n" + ASK, 0),
    "a hexadecimal length": (HEAD + b"content-length: 0x20\r\n\r\n" + ASK, 0),
    "lines that end in LF": (SECOND.replace(b"\r\n", b"\n"), 1),
    "lines that end in CR": (SECOND.replace(b"\r\n", b"\r"), 0),
    "a chunk extension of 1 MB": (HEAD + CHUNKED + chunk(ASK, b";x=" + b"y" * (1 << 20)) + b"0\r\n\r\n", 0),
    "one-byte chunks": (HEAD + CHUNKED + b"".join(chunk(b" ") for _ in range(100_000)) + chunk(ASK) + b"0\r\n\r\n", 0),
    "a chunk of a negative size": (HEAD + CHUNKED + b"-1\r\n\r\n0\r\n\r\n" + SECOND, 0),
    "a chunk of a huge size": (HEAD + CHUNKED + b"ffffffffffffffff1\r\n" + ASK, 0),
    "trailers": (HEAD + CHUNKED + chunk(ASK) + b"0\r\n" + b"x: y\r\n" * 5000 + b"\r\n", 1),
    "a header of 64 KB": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * (64 << 10) + b"\r\n\r\n" + SECOND,
        0,
    ),
    "1,000 headers": (
        b"GET /health HTTP/1.1\r\n" + b"".join(b"h%d: 1\r\n" % at for at in range(1000)) + b"\r\n" + SECOND,
        0,
    ),
    "500 ranges": (
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nrange: bytes="
        + b",".join(b"%d-%d" % (at, at) for at in range(500))
        + b"\r\n\r\n",
        0,
    ),
    "a NUL in a header": (HEAD + b"x: a\0b\r\ncontent-length: 0\r\n\r\n" + SECOND, 0),
    "a header without a name": (HEAD + b": x\r\ncontent-length: 0\r\n\r\n" + SECOND, 0),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" * 1000, 0),
    "an upgrade to HTTP/2": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
        b"http2-settings: AAMAAABkAAQAAP__\r\n\r\n",
        0,
    ),
    "an upgrade to a web socket": (
        b"GET /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n",
        0,
    ),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 0),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 0),
    "HTTP/9.9": (b"GET /health HTTP/9.9\r\nhost: localhost\r\n\r\n" + SECOND, 0),
    "an absolute address": (
        b"GET http://elsewhere.example/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        0,
    ),
    "a proxy's word": (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: 127.0.0.1:22\r\n\r\n", 0),
}
METHODS = [
    "TRACE",
    "TRACK",
    "DEBUG",
    "PUT",
    "PATCH",
    "OPTIONS",
    "PROPFIND",
    "LOCK",
    "M-SEARCH",
    "PURGE",
    "CONNECT",
    "BREW",
]
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@pytest.fixture
async def door() -> AsyncIterator[FrontDoor]:
    """That soon closes what asks nothing more."""
    limits = LimitSettings(header_timeout_s=0.25, body_timeout_s=0.25, idle_timeout_s=0.15)
    async with front_door(limits) as door:
        yield door


async def sent(door: FrontDoor, data: bytes) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
    try:
        writer.write(data)
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def series(http: httpx2.AsyncClient) -> set[str]:
    """The names of all series, without their values; of those of answers, by declared route and status, which can be so
    many and no more, only what is none of them.
    """
    text = (await http.get("/metrics")).text
    names = {line.rpartition(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
    return {
        name for name in names if not (found := ANSWERS.fullmatch(name)) or found[1].replace(":path", "") not in ROUTES
    }


ANSWERS = re.compile(r'diptych_http_answers_(?:total|created)\{route="([^"]*)",status="[1-5][0-9][0-9]"\}')
ROUTES = {"", "/v1/responses/compact", *(one.path for one in operations())}


@pytest.mark.parametrize("name", ATTACKS)
async def test_what_is_no_clean_request_is_not_taken(door: FrontDoor, name: str) -> None:
    data, most = ATTACKS[name]
    answer = await sent(door, data)
    statuses = [int(found) for found in STATUS.findall(answer)]
    assert all(status < 500 for status in statuses), answer[:500]
    assert sum(status == 200 for status in statuses) <= max(most, 1)
    await until(lambda: door.listener.connections == 0)
    assert len(door.prefill.orders) <= most
    if most == 0 and b"/health" not in data and b"/v1/models" not in data:
        assert 200 not in statuses


async def test_attacks_leave_no_series_and_a_server_that_answers(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    """Codes of refusals are a fixed set: the first attacks may show some of them, those that follow no other."""
    draw = random.Random(1)
    for data, _ in ATTACKS.values():
        await asyncio.gather(sent(door, data), sent(door, data[: len(data) // 2]), sent(door, b"GET / HT"))
    before = await series(http)
    for data, _ in ATTACKS.values():
        await asyncio.gather(*(sent(door, data[: draw.randrange(len(data))]) for _ in range(3)))
    for at in range(100):
        method = METHODS[at % len(METHODS)] if at < 60 else "".join(draw.choices("ABCDEFXYZ", k=draw.randrange(1, 20)))
        path = draw.choice(["/health", "/v1/chat/completions", f"/{at}", "/v1/files/x", "*"])
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-tenant: t{at}\r\n\r\n"
        await sent(door, head.encode())
    assert await series(http) == before
    reply = await http.post("/v1/completions", content=ASK, headers={"content-type": "application/json"})
    assert reply.status_code == 200


async def test_two_requests_on_one_connection_are_two_and_no_third(door: FrontDoor) -> None:
    answer = await sent(door, SECOND + SECOND)
    assert len(STATUS.findall(answer)) == 2
    assert len(door.prefill.orders) == 2
