"""Exceptions to HTTP answers in OpenAI's error shape, one place for all endpoints."""

from __future__ import annotations

import json
import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from diptych.protos.errors import CapacityError, DiptychError, InvalidRequest, Unauthorized
from diptych.protos.openai_replies import error_body
from diptych.protos.strict_json import printable

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
        return {"retry-after": str(math.ceil(error.retry_after_s))}
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    if error.http_status == 503 and error.retryable:
        return {"retry-after": "1"}  # an engine was lost; others are tried at once, so soon is as good as later
    return {}


def response_of(error: DiptychError) -> Response:
    """The whole answer for an error before the first byte of a reply."""
    body = json.dumps(error_body(error)).encode()
    return Response(body, error.http_status, headers_of(error), "application/json")


async def on_error(request: Request, exc: Exception) -> Response:
    """Starlette's handler for everything that an endpoint raises."""
    if isinstance(exc, HTTPException):
        path = printable(request.url.path)
        if exc.status_code == 405:
            error: DiptychError = WrongMethod(f"{path} does not answer {request.method}")
        elif exc.status_code == 404:
            error = NotFound(f"there is no {path} here")
        else:
            error = InvalidRequest(str(exc.detail))
        response = response_of(error)
        response.headers.update(exc.headers or {})
        return response
    return response_of(public(exc))
