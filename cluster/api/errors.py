"""Exceptions to HTTP answers, one place for all endpoints: in Anthropic's error shape for those who speak its wire
format, in OpenAI's for all others.
"""

from __future__ import annotations

import json
import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos import anthropic_replies
from diptych.protos.errors import (
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    RequestError,
    Unauthorized,
)
from diptych.protos.openai_replies import error_body
from diptych.protos.strict_json import printable

from .limits import allowance_headers

ROUTE = "diptych.route"  # in the scope of a request whose path is known: the path as it was declared
REQUEST_ID = "diptych.request_id"  # in the scope of a request that has an id by which clients may ask about it

# As long as OpenAI's client waits for a second try, at most. Older ones come again after half a second where they are
# told to wait for longer, and Anthropic's sleeps for hours if it is told to.
PATIENCE_S = 120
_IN_VAIN = {"x-should-retry": "false"}
_MESSAGES = "/v1/messages"
_ANTHROPIC_VERSION = b"anthropic-version"

log = logging.getLogger(__name__)


class NotFound(InvalidRequest):
    """No endpoint of that path."""

    code = "not_found"
    http_status = 404


class WrongMethod(InvalidRequest):
    """The endpoint has another method."""

    code = "method_not_allowed"
    http_status = 405


class BodyTimeout(InvalidRequest):
    """The client did not send its body in time."""

    code = "body_timeout"
    http_status = 408


def public(exc: BaseException) -> DiptychError:
    """What a client may know of an exception; anything from outside the tree is logged and becomes a 500."""
    if isinstance(exc, DiptychError):
        if exc.http_status >= 500 and not isinstance(exc, CapacityError):
            log.warning("%s: %s %s", exc.code, exc, exc.detail)
        return exc
    log.error("a request failed unexpectedly", exc_info=exc)
    return DiptychError("an internal error ended this request")


def headers_of(error: DiptychError) -> dict[str, str]:
    """Headers that belong to an error's answer."""
    if isinstance(error, CapacityError):
        told = math.ceil(error.retry_after_s), math.ceil(1000 * error.retry_after_s)
        # A gateway's limit tells what is left of all of its kinds.
        left = allowance_headers(getattr(error, "allowances", ()))
        more = {name.decode(): value.decode() for name, value in left}
        more |= _IN_VAIN if told[0] > PATIENCE_S else {}
        # OpenAI's clients read the exact one.
        return {"retry-after": str(told[0]), "retry-after-ms": str(told[1]), **more}
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    if error.http_status == 503 and error.retryable:
        return {"retry-after": "1"}  # an engine was lost; others are tried at once, so soon is as good as later
    if isinstance(error, DeadlineExceeded) or (isinstance(error, RequestError) and error.http_status == 409):
        # OpenAI's and Anthropic's clients send every 504 and 409 again, twice: all of its time would be spent anew.
        return dict(_IN_VAIN)
    if error.is_lasting:
        return dict(_IN_VAIN)
    return {}


def is_anthropic(scope: Scope) -> bool:
    """Whether a request speaks Anthropic's wire format: on its paths, and wherever a version of it is named."""
    path: str = scope["path"]
    if path == _MESSAGES or path.startswith(_MESSAGES + "/"):
        return True
    return any(name == _ANTHROPIC_VERSION for name, _ in scope["headers"])


def id_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The request's id, where it has one, under the names by which clients look for it."""
    if (name := scope.get(REQUEST_ID)) is None:
        return []
    value = name.encode()
    return [(b"x-request-id", value)] + ([(b"request-id", value)] if is_anthropic(scope) else [])


def response_of(error: DiptychError, scope: Scope) -> Response:
    """The whole answer for an error before the first byte of a reply."""
    if is_anthropic(scope):
        status, body = anthropic_replies.error_status(error), anthropic_replies.error_body(error, scope.get(REQUEST_ID))
    else:
        status, body = error.http_status, error_body(error)
    response = Response(json.dumps(body).encode(), status, headers_of(error), "application/json")
    response.raw_headers.extend(id_headers(scope))
    return response


def _methods_of(request: Request) -> list[str]:
    """Of all routes of the path: Starlette asks the first one alone."""
    found: dict[str, set[str]] = {}
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found.setdefault(route.path, set()).update(route.methods or ())
    return sorted(next(iter(found.values()), ()))  # a path with a name stands before one with a part for any


def _meant_by(request: Request) -> str:
    """The path that a client has that was told a base URL with /v1 in place of one without, or the other way round."""
    bare = request.scope["path"].rstrip("/")
    for path in (bare, "/v1" + bare, bare.removeprefix("/v1")):
        scope = {**request.scope, "path": path}
        if any(isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE for route in request.app.routes):
            return printable(path)
    return ""


async def on_error(request: Request, exc: Exception) -> Response:
    """Starlette's handler for everything that an endpoint raises."""
    if isinstance(exc, HTTPException):
        path = printable(request.url.path)
        if exc.status_code == 405:
            allowed = ", ".join(_methods_of(request))
            error: DiptychError = WrongMethod(f"{path} does not answer {request.method}, but {allowed}")
            exc.headers = {"allow": allowed}
        elif exc.status_code == 404:
            meant = _meant_by(request)
            error = NotFound(
                f"there is no {path} here" + (f", but {meant}: look at the client's base URL" if meant else "")
            )
        else:
            error = InvalidRequest(str(exc.detail))
        response = response_of(error, request.scope)
        response.headers.update(exc.headers or {})
        return response
    return response_of(public(exc), request.scope)


class Barrier:
    """The app behind it may raise anything before its answer begins: the client is told, the log once. What breaks an
    answer that has begun goes on to the server, which closes the connection. All answers are counted.
    """

    def __init__(self, app: ASGIApp, *, metrics: RouterMetrics) -> None:
        self._app = app
        self._answers = metrics.counters["http_answers"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start":
                self._answers.labels(scope.get(ROUTE, ""), str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as exc:
            if has_begun or scope["type"] != "http":
                raise
            await response_of(public(exc), scope)(scope, receive, sending)
