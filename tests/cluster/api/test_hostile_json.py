"""Bodies that are no JSON, or too much of it, at every endpoint that reads JSON: 400 or 413, never a 5xx, and the event
loop goes on meanwhile (exam row S14).

It guards against an endpoint whose body is read by another way than the others'.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

from diptych.cluster.api.description.document import operations
from diptych.cluster.api.testing import FrontDoor

PATHS = [one.path for one in operations() if one.body is not None and one.body_media == "application/json"]
TEXT = '{"model":"echo","prompt":"hello"}'
KEYS = ",".join(f'"k{at}":1' for at in range(1_000_000))
BODIES: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"model":',
    "list": b"[]",
    "number": b"1",
    "twice": b'{"model":"echo","model":"echo"}',
    "deep lists": b'{"model":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "a million keys": b"{" + KEYS.encode() + b"}",
    "many keys": b"{" + KEYS[:3_500_000].rpartition(",")[0].encode() + b"}",
    "many equal keys": b"{" + b",".join([b'"k":1'] * 500_000) + b"}",
    "a long number": b'{"model":' + b"9" * 5000 + b"}",
    "a longer number": b'{"model":' + b"9" * 3_000_000 + b"}",
    "a long fraction": b'{"model":0.' + b"9" * 3_000_000 + b"}",
    "half a surrogate": b'{"model":"\\ud800"}',
    "surrogates the wrong way": b'{"model":"\\udc00\\ud800"}',
    "a surrogate in UTF-8": b'{"model":"\xed\xa0\x80"}',
    "no UTF-8": b'{"model":"\xff\xfe"}',
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-32": TEXT.encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "NUL": b"\0" * 1000,
    "NUL in a name": b'{"mo\0del":"echo"}',
    "NUL in a text": b'{"model":"ec\0ho"}',
    "an escaped NUL": b'{"model":"ec\\u0000ho"}',
    "NaN": b'{"model":NaN}',
    "a comment": b'{"model":"echo" /* so it is */}',
    "two bodies": TEXT.encode() * 2,
    "spaces": b" " * 3_000_000,
    "brackets": b"[" * 3_000_000,
    "quotes": b'"' * 3_000_000,
    "backslashes": b'{"a":"' + b"\\" * 3_000_000,
}
LAG_S = 4 * 0.1  # of this process's own time; four times what is wanted


class Lag:
    """The most of this process's time that passed between two turns of the loop: what a stream beside would have waited
    for, on a machine of its own.
    """

    def __init__(self) -> None:
        self.most = 0.0

    async def watch(self) -> None:
        while True:
            last = time.process_time()
            await asyncio.sleep(0.001)
            self.most = max(self.most, time.process_time() - last)


def posted(url: str, path: str, body: bytes, times: int = 1) -> tuple[int, bytes]:
    """The answer's status and body. In a thread: the loop is the server's alone."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=60) as sock:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        sock.sendall(f"{head}content-length: {len(body) * times}\r\n\r\n".encode())
        try:
            for _ in range(times):
                sock.sendall(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was refused before it was sent
        pieces = []
        while piece := sock.recv(1 << 16):
            pieces.append(piece)
    head_bytes, _, answer = b"".join(pieces).partition(b"\r\n\r\n")
    return int(head_bytes.split(b" ")[1]), answer


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_is_no_request_is_refused_and_the_loop_goes_on(door: FrontDoor, path: str) -> None:
    lag = Lag()
    watching = asyncio.create_task(lag.watch())
    try:
        for name, body in BODIES.items():
            for _ in range(3):  # a busy machine's caches make CPU time longer: the best counts
                lag.most = 0.0
                status, answer = await asyncio.to_thread(posted, door.listener.url, path, body)
                if lag.most <= LAG_S:
                    break
            large = len(body) > door.router.settings.limits.body_bytes
            assert status == 413 if large else status in (400, 404), (name, status, answer[:200])
            assert "error" in json.loads(answer), name
            assert b"Traceback" not in answer
            assert lag.most <= LAG_S, (name, lag.most)
    finally:
        watching.cancel()
    assert door.prefill.orders == door.decode.orders == []


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_of_100_mb_is_413(door: FrontDoor, path: str) -> None:
    lag = Lag()
    watching = asyncio.create_task(lag.watch())
    status, _ = await asyncio.to_thread(posted, door.listener.url, path, b"x" * (1 << 20), 100)
    watching.cancel()
    assert status == 413
    assert lag.most <= LAG_S
