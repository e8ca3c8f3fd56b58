"""What Google's errors (google.rpc.Status as JSON) say, as failures.

Called by gemini.py for answers with an error status, and for errors that come within a stream. Words and names are of
Google's pages on errors and limits and of their users' reports, as of 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from diptych.protos.failures import Failure, FailureKind
from diptych.protos.strict_json import printable

from .codec import JsonObject
from .error_bodies import clean_line, kind_of_status, retry_after_s, told_by, told_in
from .failure_words import failure_of
from .loose_values import json_in, list_in, object_in, text_in

_KINDS: Final[dict[str, FailureKind]] = {
    "INVALID_ARGUMENT": FailureKind.BAD_REQUEST,
    "OUT_OF_RANGE": FailureKind.BAD_REQUEST,
    "FAILED_PRECONDITION": FailureKind.AUTH,  # of the project: its country, its billing
    "UNAUTHENTICATED": FailureKind.AUTH,
    "PERMISSION_DENIED": FailureKind.AUTH,
    "NOT_FOUND": FailureKind.NOT_FOUND,
    "RESOURCE_EXHAUSTED": FailureKind.RATE_LIMITED,
    "UNAVAILABLE": FailureKind.OVERLOADED,
    "UNIMPLEMENTED": FailureKind.UNSUPPORTED,
}
_TOO_LONG = re.compile(
    r"token count.{0,80}exceeds|maximum number of (?:input )?tokens|(?:context|prompt) is too l(?:ong|arge)"
)
_NO_KEY = re.compile(r"api[ _]key(?: is)? (?:not valid|invalid|expired|not found)|api_key_invalid|reported as leaked")
_LACKING = re.compile(
    r"thought.?signature|(?:is|are) (?:not supported|unsupported|not enabled)|not supported (?:by|for|in)"
    r"|does(?: not|n't) support|thinking.?(?:level|budget|mode)|cannot find field"
)
_FILTERED = re.compile(
    r"safety polic|prohibited (?:use|content)|blocked by|usage guidelines|responsible ai|sensitive words"
)
# Limits that no short wait lifts.
_SPENT = re.compile(
    r"per_?\s?day|credits? (?:are|is) (?:depleted|exhausted)|spend(?:ing)? (?:cap|limit)|limit: 0\b|prepay"
)


def read_failure(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """What an answer with an error status says. Never raises."""
    error = _error_in(body)
    return failure_of(status, headers, told_in(body)) if error is None else read_error(error, status, headers)


def read_error(error: JsonObject, status: int = 0, headers: Mapping[str, str] | None = None) -> Failure:
    """What a google.rpc.Status says. With `status` 0, within an answer, its own code counts."""
    told = told_by({"error": error})
    known = [entry for entry in list_in(error.get("details")) if isinstance(entry, dict)]
    reason = next((entry["reason"] for entry in known if isinstance(entry.get("reason"), str)), "")
    name = text_in(error.get("status"))
    status = status or told.status
    kind = _kind(status, name, told.words.lower(), f"{reason} {' '.join(_quotas(known))}".lower())
    waits = kind in (FailureKind.RATE_LIMITED, FailureKind.QUOTA, FailureKind.OVERLOADED, FailureKind.SERVER)
    return Failure(
        kind=kind,
        message=clean_line(told.message) or f"HTTP status {status}, without a word",
        status=status,
        retry_after_s=retry_after_s(headers or {}, told) if waits else None,
        param=_field(known),
        code=clean_line(reason or name)[:80],
    )


def _kind(status: int, name: str, words: str, details: str) -> FailureKind:
    kind = _KINDS.get(name) or kind_of_status(status)
    if kind is FailureKind.RATE_LIMITED:
        return FailureKind.QUOTA if _SPENT.search(words) or _SPENT.search(details) else kind
    if name == "FAILED_PRECONDITION" and "billing" in words:
        return FailureKind.QUOTA
    if _TOO_LONG.search(words):
        return FailureKind.CONTEXT_LENGTH
    if kind is not FailureKind.BAD_REQUEST:
        return kind
    if _NO_KEY.search(words) or _NO_KEY.search(details):
        return FailureKind.AUTH
    if _FILTERED.search(words):
        return FailureKind.CONTENT_POLICY
    return FailureKind.UNSUPPORTED if _LACKING.search(words) else kind


def _error_in(body: bytes) -> JsonObject | None:
    """A stream that is no text/event-stream is a list, and so is its error."""
    found = json_in(body.decode("utf-8", "replace"))
    if isinstance(found, list) and found:
        found = found[0]
    return object_in(object_in(found).get("error")) or None


def _quotas(details: list[JsonObject]) -> Iterator[str]:
    for violation in _violations(details, "violations"):
        yield str(violation.get("quotaId", ""))
    for entry in details:
        yield str(object_in(entry.get("metadata")).get("quota_limit", ""))


def _field(details: list[JsonObject]) -> str:
    for violation in _violations(details, "fieldViolations"):
        if isinstance(violation.get("field"), str):
            return printable(violation["field"], 120)
    return ""


def _violations(details: list[JsonObject], name: str) -> Iterator[JsonObject]:
    for entry in details:
        yield from (violation for violation in list_in(entry.get(name)) if isinstance(violation, dict))
