"""OpenAI's batches on the wire, as pure functions: the request, a line of the input, the object, lines of results.

Called by cluster/api and cluster/batches. Knows no endpoint's body: each endpoint's own reader checks that.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import DiptychError, InvalidRequest, RequestError
from .openai_files import FILE_ID, read_expiry, unknown_file
from .openai_replies import error_body
from .strict_json import parse_object, printable
from .wire_checks import JsonObject, a_text, an_object, compact, compact_in_pieces, one_of, refuse

BATCH_ID: Final = re.compile(r"batch_[0-9a-f]{32}")
ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_CUSTOM_ID_CHARS: Final = 512
MOST_WINDOW_S: Final = 7 * 86_400
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_UNIT_S: Final = {"m": 60, "h": 3600, "d": 86_400}
_REQUEST_FIELDS: Final = ("completion_window", "endpoint", "input_file_id", "metadata", "output_expires_after")
_LINE_FIELDS: Final = ("body", "custom_id", "method", "url")
MAX_LABELS: Final = 16
# The states that a batch leaves again, and those it ends in.
VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING = "validating", "in_progress", "finalizing", "cancelling"
LIVE: Final = (VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING)
FAILED, COMPLETED, EXPIRED, CANCELLED = "failed", "completed", "expired", "cancelled"
ENDED: Final = (FAILED, COMPLETED, EXPIRED, CANCELLED)
# Lines that were never answered, by the state that they were left in.
UNANSWERED: Final = {
    EXPIRED: ("batch_expired", "the completion window was over before this request was answered"),
    CANCELLED: ("batch_cancelled", "the batch was cancelled before this request was answered"),
}


class UnknownBatch(RequestError):
    """The tenant has no batch of that id; whether another has one is not told."""

    code = "batch_not_found"
    http_status = 404


class BatchOver(RequestError):
    """The batch has ended and cannot be cancelled."""

    code = "batch_over"
    http_status = 409


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    window: str
    window_s: int
    labels: Mapping[str, str] | None
    output_expires_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as clients see it. Times in seconds since 1970; `total`, `completed`, `failed` count requests."""

    id: str
    endpoint: str
    input_file_id: str
    window: str
    status: str
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    model: str | None = None
    labels: Mapping[str, str] | None = None
    errors: list[JsonObject] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch: the body as JSON for its endpoint."""

    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


class WrongLine(Exception):
    """A line of the input that cannot be a request. `code` is one of OpenAI's words."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)
        self.code, self.message, self.param = code, message, param

    def told(self, line: int | None) -> JsonObject:
        """An entry of the batch's errors; `line` counts from 1."""
        return {"code": self.code, "message": self.message, "param": self.param, "line": line}


def unknown_batch(batch_id: str) -> UnknownBatch:
    """The error for an id that is nobody's, is another's, or is none at all: in one wording."""
    return UnknownBatch(f"there is no batch {printable(batch_id)}", "batch_id")


def parse_batch(body: bytes) -> BatchRequest:
    """The request for a batch. Raises InvalidRequest, UnknownFile."""
    fields = parse_object(body)
    for name in fields:
        if name not in _REQUEST_FIELDS:
            known = ", ".join(_REQUEST_FIELDS)
            raise InvalidRequest(f"unknown field {printable(name)}; here may stand: {known}", printable(name))
    file_id = a_text(fields.get("input_file_id"), "input_file_id", most=256)
    if not FILE_ID.fullmatch(file_id):
        raise unknown_file(file_id, "input_file_id")
    endpoint = one_of(fields.get("endpoint"), "endpoint", ENDPOINTS)
    window, window_s = _window(fields.get("completion_window"))
    return BatchRequest(
        input_file_id=file_id,
        endpoint=endpoint,
        window=window,
        window_s=window_s,
        labels=read_metadata(fields.get("metadata"), "metadata"),
        output_expires_s=read_expiry(fields.get("output_expires_after"), "output_expires_after"),
    )


def _window(value: object) -> tuple[str, int]:
    text = a_text(value, "completion_window", most=16)
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= MOST_WINDOW_S:
        raise refuse("completion_window", "must be 24h, or another number of minutes, hours or days up to 7d")
    return text, seconds


def read_metadata(value: object, path: str) -> dict[str, str] | None:
    """Labels that are kept and told again; None for null. Raises InvalidRequest."""
    if value is None:
        return None
    labels = an_object(value, path)
    if len(labels) > MAX_LABELS:
        raise refuse(path, f"has {len(labels)} entries; the limit is {MAX_LABELS}")
    for name, label in labels.items():
        if not 0 < len(name) <= 64:
            raise refuse(path, f"has a key of {len(name)} characters; 1 to 64 are allowed")
        if not isinstance(label, str) or len(label) > 512:
            raise refuse(f"{path}.{printable(name)}", "must be a string of at most 512 characters")
    return labels


def parse_line(raw: bytes, endpoint: str) -> BatchLine:
    """One line of the input of a batch for `endpoint`. Raises WrongLine."""
    try:
        fields = parse_object(raw)
    except InvalidRequest as exc:
        raise WrongLine("invalid_json_line", exc.message.replace("the body", "the line", 1), exc.param) from None
    for name in fields:
        if name not in _LINE_FIELDS:
            known = ", ".join(_LINE_FIELDS)
            raise WrongLine(
                "unknown_parameter", f"unknown field {printable(name)}; here may stand: {known}", printable(name)
            )
    for name in ("custom_id", "method", "url", "body"):
        if fields.get(name) is None:
            raise WrongLine("missing_required_parameter", f"{name} is missing", name)
    custom_id, method, url, body = (fields[name] for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS or "\0" in custom_id:
        words = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        raise WrongLine("invalid_custom_id", words, "custom_id")
    if method != "POST":
        raise WrongLine("invalid_method", "method must be POST", "method")
    if url != endpoint:
        raise WrongLine("invalid_url", f"url must be the batch's endpoint, {endpoint}", "url")
    if not isinstance(body, dict):
        raise WrongLine("invalid_body", "body must be an object", "body")
    return BatchLine(custom_id, compact(body).encode())


def wrong_body(error: DiptychError) -> WrongLine:
    """What an endpoint's reader said of a line's body."""
    param = error.param if isinstance(error, RequestError) else None
    return WrongLine(error.code, error.message, f"body.{param}" if param else "body")


def batch_object(batch: Batch) -> JsonObject:
    """A batch as the API tells it."""
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": batch.input_file_id,
        "completion_window": batch.window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at if batch.status == EXPIRED else None,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": batch.reasoning_tokens},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        },
        "metadata": None if batch.labels is None else dict(batch.labels),
    }


def result_line(
    line_id: str,
    custom_id: str,
    *,
    status: int | None = None,
    request_id: str = "",
    body: JsonObject | None = None,
    error: tuple[str, str] | None = None,
) -> bytes:
    """One line of an output or error file, its newline included. Without `status` nothing answered the request; `error`
    is a code and a sentence.
    """
    response = None if status is None else {"status_code": status, "request_id": request_id, "body": body}
    told = None if error is None else {"code": error[0], "message": error[1]}
    entry = {"id": line_id, "custom_id": custom_id, "response": response, "error": told}
    return compact_in_pieces(entry).encode() + b"\n"


def line_id_of(batch_id: str, line: int) -> str:
    """The id of a line's result: the same however often the line was begun."""
    return "batch_req_" + hashlib.sha256(f"{batch_id}:{line}".encode()).hexdigest()[:32]


def refused_line(line_id: str, custom_id: str, error: DiptychError, request_id: str) -> bytes:
    """The result of a request that was answered with an error."""
    return result_line(line_id, custom_id, status=error.http_status, request_id=request_id, body=error_body(error))


def schema_faults(body: Mapping[str, Any]) -> list[str]:
    """How an answer fails the form that its request asked for: in the choices of chat and completions, or at the top of
    another answer.
    """
    found = list(body.get("schema_errors") or ())
    for choice in body.get("choices") or ():
        if isinstance(choice, dict):
            found += choice.get("schema_errors") or ()
    return [str(fault) for fault in found]


def usage_of(body: Mapping[str, Any]) -> Usage:
    """The tokens of an answer, in whichever of OpenAI's words it counts them."""
    told = body.get("usage") or {}
    inner = told.get("input_tokens_details") or told.get("prompt_tokens_details") or {}
    outer = told.get("output_tokens_details") or told.get("completion_tokens_details") or {}
    return Usage(
        input_tokens=told.get("input_tokens") or told.get("prompt_tokens") or 0,
        cached_tokens=inner.get("cached_tokens") or 0,
        output_tokens=told.get("output_tokens") or told.get("completion_tokens") or 0,
        reasoning_tokens=outer.get("reasoning_tokens") or 0,
    )
