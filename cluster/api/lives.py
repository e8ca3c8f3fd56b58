"""GET /v1/requests and /v1/requests/{id}, POST /v1/requests/{id}/cancel: what became of a tenant's own requests.

Of this replica alone, from its router's registry. Another tenant's request is as unknown as one that never was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from diptych.cluster.router.life import ENDS, Life, State
from diptych.cluster.router.registry import KEPT_S, TrackedRequest
from diptych.cluster.router.router import Router
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.strict_json import printable

from .access import tenant_of
from .errors import REQUEST_ID

MAX_LISTED = 100
LISTED = 20
CANCEL_WAIT_S = 1.0  # a cancelled request is told with its end, where that comes soon


class UnknownRequest(InvalidRequest):
    """This replica knows no such request of the tenant."""

    code = "request_not_found"
    http_status = 404


@contextmanager
def track(router: Router, scope: Scope, id_prefix: str, born: float) -> Iterator[TrackedRequest]:
    """An HTTP request that clients may ask about, while the block lasts. Raises InvalidRequest for a wrong tenant."""
    tenant = tenant_of(scope)
    scope[REQUEST_ID] = name = id_prefix + os.urandom(12).hex()
    with router.requests.request(name, tenant=tenant, endpoint=scope["path"], born=born) as request:
        yield request


class LivesPages:
    """The three routes."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def list(self, request: Request) -> Response:
        """The tenant's last requests, the newest first."""
        query = request.query_params
        if twice := [name for name in query if len(query.getlist(name)) > 1]:
            raise InvalidRequest(f"{printable(twice[0])} is given twice", printable(twice[0]))
        unknown = sorted(set(query) - {"limit", "state"})
        if unknown:
            raise InvalidRequest(f"there is no query {printable(unknown[0])} here; there are: limit, state", unknown[0])
        entries = self._router.requests.latest(
            tenant_of(request.scope), limit=_limit(query.get("limit")), state=_state(query.get("state"))
        )
        return JSONResponse({"object": "list", "data": [self._told(entry) for entry in entries]})

    async def one(self, request: Request) -> Response:
        """One request."""
        return JSONResponse(self._told(self._find(request)))

    async def cancel(self, request: Request) -> Response:
        """End one request; one that is over is told as it is."""
        entry = self._find(request)
        entry.cancel()
        await entry.over(CANCEL_WAIT_S)
        return JSONResponse(self._told(entry))

    def _find(self, request: Request) -> TrackedRequest:
        name = request.path_params["id"]
        entry = self._router.requests.find(name, tenant_of(request.scope))
        if entry is None:
            raise UnknownRequest(
                f"there is no request {printable(name)}; requests are known to the replica that served them, until "
                f"{KEPT_S / 60:g} minutes after their end",
                "id",
            )
        return entry

    def _told(self, entry: TrackedRequest) -> JsonObject:
        now, state = self._router.clock(), entry.state
        is_over = entry.state_at_end is not None
        return {
            "id": entry.id,
            "object": "request",
            "created": int(entry.created),
            "endpoint": entry.endpoint,
            "model": entry.model or None,
            "state": state.value,
            "is_over": is_over,
            "is_cancelled": state is State.CANCELLED or entry.interrupt is not None,
            "error": {"code": entry.error_code, "message": entry.error_message} if entry.error_code else None,
            "total_s": _seconds((entry.ended_at if is_over else now) - entry.born),
            "num_tokens": entry.num_tokens,
            "router": self._router.router_id,
            "choices": [_choice(life) for life in entry.lives],
        }


def _choice(life: Life) -> JsonObject:
    return {
        "state": life.state.value,
        "prompt_tokens": life.num_prompt_tokens,
        "tokens": life.num_tokens,
        "seconds": {state.value: _seconds(spent) for state, spent in life.seconds().items()},
        "attempts": life.num_placements,
        "placements": [
            {
                "prefill_engine": one.prefill_engine or None,
                "decode_engine": one.decode_engine,
                "path": one.path,
                "at_s": _seconds(one.at_s),
                "ended_by": one.ended_by or None,
            }
            for one in life.placements
        ],
        "error_code": life.error_code or None,
    }


def _seconds(value: float) -> float:
    return round(value, 6)


def _limit(text: str | None) -> int:
    if text is None:
        return LISTED
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_LISTED):
        raise InvalidRequest(f"limit is {printable(text)}; give a whole number from 1 to {MAX_LISTED}", "limit")
    return int(text)


def _state(text: str | None) -> State | None:
    if text is None:
        return None
    try:
        return State(text)
    except ValueError:
        live = ", ".join(state for state in State if state not in ENDS)
        ended = ", ".join(sorted(ENDS))
        raise InvalidRequest(f"state is {printable(text)}; in work are {live}; ended are {ended}", "state") from None
