"""One HTTP request to an ASGI app in this process, for callers that reach the router through a Serve handle."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message, Scope


async def post_json(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """POST a JSON body; the status and the JSON answer."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status = 500
    parts: list[bytes] = []

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()  # the caller stays; when it is cancelled, so is this
        return messages.pop()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    answer: dict[str, Any] = json.loads(b"".join(parts))
    return status, answer
