"""GET, DELETE and cancel of /v1/responses/{id}, its input items, its stream from any event on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.responses import SEALED, read_includes
from diptych.protos.responses_replies import deleted, item_list
from diptych.protos.strict_json import printable

from .access import tenant_of
from .errors import NotFound
from .generation import until_disconnect
from .responses import Responses, send_frames
from .responses_kept import Kept
from .responses_seal import Seal

MAX_LISTED = 100
LISTED = 20
MAX_SEQUENCE_DIGITS = 9


class ResponsesPages:
    """The routes of one app."""

    def __init__(self, responses: Responses) -> None:
        self._responses = responses

    async def one(self, request: Request) -> Response:
        """The response as it is now, or its events."""
        query = _query(request, {"include", "include_obfuscation", "starting_after", "stream"})
        if _flag(query, "include_obfuscation"):
            raise InvalidRequest("include_obfuscation is not offered: leave it out", "include_obfuscation")
        after = _sequence(query.get("starting_after"))
        tenant = tenant_of(request.scope)
        kept = await self._responses.kept.find(tenant, request.path_params["id"])
        if _flag(query, "stream"):
            if not kept.has_events:
                raise InvalidRequest(
                    "stream is for responses that were asked for with background: true and stream: true", "stream"
                )
            return _Frames(self._responses, tenant, kept.id, -1 if after is None else after)
        if after is not None:
            raise InvalidRequest("starting_after is for stream=true", "starting_after")
        if SEALED not in _included(request):
            return _told(kept)
        seal = await self._responses.kept.seal(tenant)
        return JSONResponse(await asyncio.to_thread(_sealed, kept, seal))

    async def delete(self, request: Request) -> Response:
        """It is gone, and the work on it ends."""
        _query(request, ())
        tenant, name = tenant_of(request.scope), request.path_params["id"]
        kept = await self._responses.kept.find(tenant, name)
        if not kept.is_over:
            await self._responses.background.cancel(tenant, name)
        await self._responses.kept.remove(tenant, name)
        return JSONResponse(deleted(name))

    async def cancel(self, request: Request) -> Response:
        """The response with its end; one that is over is told as it is."""
        _query(request, ())
        tenant, name = tenant_of(request.scope), request.path_params["id"]
        kept = await self._responses.kept.find(tenant, name)
        if not kept.in_background:
            raise InvalidRequest(
                "only background responses are cancelled by their id; any other ends when its client goes away",
                "response_id",
            )
        if not kept.is_over:
            await self._responses.background.cancel(tenant, name)
            kept = await self._responses.kept.find(tenant, name)
        return _told(kept)

    async def items(self, request: Request) -> Response:
        """A page of the response's own input."""
        query = _query(request, {"after", "include", "limit", "order"})
        _included(request)
        limit, order = _limit(query.get("limit")), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order is {printable(order, 40)}; it is asc or desc", "order")
        kept = await self._responses.kept.find(tenant_of(request.scope), request.path_params["id"])
        items: list[JsonObject] = await asyncio.to_thread(json.loads, kept.input_text)
        items = items if order == "asc" else items[::-1]
        first = 0
        if (after := query.get("after")) is not None:
            places = [at for at, item in enumerate(items) if item["id"] == after]
            if not places:
                raise InvalidRequest(f"after: {printable(after, 40)} is no item of this response's input", "after")
            first = places[0] + 1
        page = items[first : first + limit]
        return JSONResponse(item_list(page, has_more=first + limit < len(items)))

    async def compact(self, request: Request) -> Response:
        """Not offered, under its name."""
        raise NotFound("this server does not compact conversations; truncation: auto drops the oldest turns")


def _told(kept: Kept) -> Response:
    """As it lies in the store."""
    return Response(kept.text, media_type="application/json")


def _sealed(kept: Kept, seal: Seal) -> JsonObject:
    body = kept.body
    for item in body["output"]:
        if item["type"] == "reasoning" and "encrypted_content" not in item:
            item["encrypted_content"] = seal.close("".join(part["text"] for part in item["content"]))
    return body


class _Frames(Response):
    """A stream as a response of Starlette's; the client may go away at any time."""

    def __init__(self, responses: Responses, tenant: str, response_id: str, after: int) -> None:
        super().__init__()
        self._responses = responses
        self._asked = tenant, response_id, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        tenant, name, after = self._asked
        stream = send_frames(self._responses.background, tenant, name, after, [], send)
        await until_disconnect(receive, stream)


def _query(request: Request, known: Collection[str]) -> dict[str, str]:
    """The last value of each; `include` may be a list. Raises InvalidRequest for others."""
    found = {}
    for name, value in request.query_params.multi_items():
        bare = "include" if name in ("include", "include[]") else name
        if bare not in known:
            there = f"there are: {', '.join(sorted(known))}" if known else "there are none"
            raise InvalidRequest(f"there is no query {printable(name, 40)} here; {there}", printable(name, 40))
        found[bare] = value
    return found


def _included(request: Request) -> frozenset[str]:
    given = [value for name, value in request.query_params.multi_items() if name in ("include", "include[]")]
    return read_includes(given, "include")


def _flag(query: dict[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name} is {printable(value, 40)}; it is true or false", name)
    return value == "true"


def _sequence(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_SEQUENCE_DIGITS):
        raise InvalidRequest(f"starting_after is {printable(text, 40)}; give an event's number", "starting_after")
    return int(text)


def _limit(text: str | None) -> int:
    if text is None:
        return LISTED
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_LISTED):
        raise InvalidRequest(f"limit is {printable(text, 40)}; give a whole number from 1 to {MAX_LISTED}", "limit")
    return int(text)
