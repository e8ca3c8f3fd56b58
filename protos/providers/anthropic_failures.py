"""Anthropic's errors, by their type, and where that says little by their words.

Called by anthropic.py for answers with an error status, by anthropic_stream.py for errors that come as events.
Format: platform.claude.com/docs/en/api/errors, read 2026-11-23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .codec import JsonObject
from .error_bodies import Told, retry_after_s, told_by, told_in
from .failure_words import failure_of

_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_SPENT = re.compile(r"(?i)reached your (?:specified )?(?:[\w-]+ )?usage limit")


def read_failure(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """What an answer with an error status says. Never raises."""
    return _failure(told_in(body), status, headers)


def read_error(event: JsonObject) -> Failure:
    """What an error within an answer says; its type stands for the status that there is none of."""
    told = told_by(event)
    return _failure(told, _STATUSES.get(told.type, 0), {})


def _failure(told: Told, status: int, headers: Mapping[str, str]) -> Failure:
    found = failure_of(status, headers, told)
    if found.kind is FailureKind.BAD_REQUEST and _SPENT.search(told.words):
        return replace(found, kind=FailureKind.QUOTA, retry_after_s=retry_after_s(headers, told))
    return found


def broken(words: str) -> ProviderFailure:
    """The failure of an answer that is none."""
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=f"the provider's answer broke off: {words}"))
