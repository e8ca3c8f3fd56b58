"""Reads a request's body within its limits. Over the limit the answer is sent first and the rest is thrown away."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.config import LABEL_RULE, LimitSettings, is_label
from diptych.protos.errors import DiptychError, InvalidRequest, RequestTooLarge

from .errors import BodyTimeout, response_of

# A connection closed with unread data resets, and the client may lose the answer: so much is read and dropped.
LINGER_BYTES = 256 << 20
LINGER_S = 2.0


def header(scope: Scope, name: bytes) -> str:
    """The last value of a header, or an empty string."""
    found = ""
    for key, value in scope["headers"]:
        if key == name:
            found = value.decode("latin-1")
    return found


def label(scope: Scope, name: str) -> str:
    """A header that names something, such as x-tenant; empty when it is not there. Raises InvalidRequest."""
    key = name.encode()
    values: list[str] = [value.decode("latin-1") for given, value in scope["headers"] if given == key]
    if not values:
        return ""
    if len(values) > 1:
        raise InvalidRequest(f"the header {name} is given {len(values)} times; send it once", name)
    if not is_label(values[0]):
        raise InvalidRequest(f"the header {name} {LABEL_RULE}; leave it out for none", name)
    return values[0]


async def read_body(scope: Scope, receive: Receive, limits: LimitSettings) -> bytes:
    """The whole body. Raises RequestTooLarge as early as possible, BodyTimeout, InvalidRequest, ClientDisconnect."""
    content_type = header(scope, b"content-type").partition(";")[0].strip().lower()
    if content_type != "application/json":  # a web page can send other types across origins without being asked
        raise InvalidRequest("send the body with the header content-type: application/json")
    if header(scope, b"content-encoding").lower() not in ("", "identity"):
        raise InvalidRequest("compressed bodies are not accepted")
    declared = header(scope, b"content-length")
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise _too_large(limits)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                piece = message.get("body", b"")
                size += len(piece)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {limits.body_timeout_s:g} s") from None


def _too_large(limits: LimitSettings) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {limits.body_bytes} bytes")


async def refuse_body(error: DiptychError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer `error` at once, then read and drop what the client still sends, for a while, and close."""
    response = response_of(error, scope)
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    dropped = 0
    try:
        async with asyncio.timeout(0 if isinstance(error, BodyTimeout) else LINGER_S):
            while dropped < LINGER_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
