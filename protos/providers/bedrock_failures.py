"""Bedrock's errors, by their type, and where that says little by their words.

Called by bedrock.py for answers with an error status, by bedrock_stream.py for exceptions amid a stream.
Format: docs.aws.amazon.com/bedrock/latest/userguide/troubleshooting-api-error-codes.html, read 2026-11-23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .codec import JsonObject
from .error_bodies import Told, clean_line, retry_after_s, told_by, told_in
from .failure_words import failure_of

_KINDS = {
    "accessdenied": FailureKind.AUTH,
    "conflict": FailureKind.SERVER,
    "expiredtoken": FailureKind.AUTH,
    "incompletesignature": FailureKind.AUTH,
    "internalserver": FailureKind.SERVER,
    "invalidclienttokenid": FailureKind.AUTH,
    "invalidsignature": FailureKind.AUTH,
    "missingauthenticationtoken": FailureKind.AUTH,
    "modelerror": FailureKind.SERVER,
    "modelnotready": FailureKind.OVERLOADED,
    "modelstreamerror": FailureKind.SERVER,
    "modeltimeout": FailureKind.SERVER,
    "optinrequired": FailureKind.AUTH,
    "resourcenotfound": FailureKind.NOT_FOUND,
    "servicequotaexceeded": FailureKind.QUOTA,
    "serviceunavailable": FailureKind.OVERLOADED,
    "throttling": FailureKind.RATE_LIMITED,
    "unrecognizedclient": FailureKind.AUTH,
}
_WAITING = (FailureKind.RATE_LIMITED, FailureKind.OVERLOADED, FailureKind.QUOTA, FailureKind.SERVER)
_NO_MODEL = re.compile(
    r"(?i)model identifier is invalid|on-demand throughput isn.t supported|end of its life"
    r"|could not resolve the foundation model|model is (?:marked )?.{0,20}legacy"
)
_ENDING = re.compile(r"(?:Exception|Error)$")


def read_failure(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """What an answer with an error status says. Never raises."""
    told = told_in(body)
    kind = headers.get("x-amzn-errortype") or _inner_type(body) or told.code
    return _failure(kind, told, status, headers)


def read_error(kind: str, event: JsonObject) -> Failure:
    """What an error of the type `kind` within an answer says."""
    return _failure(kind, told_by(event), 0, {})


def is_exception(event: str) -> bool:
    """Whether an event's type is that of an error."""
    return event == "error" or _ENDING.search(event) is not None


def broken(words: str) -> ProviderFailure:
    """The failure of an answer that is none."""
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=f"the provider's answer broke off: {words}"))


def _failure(kind: str, told: Told, status: int, headers: Mapping[str, str]) -> Failure:
    """Types come with a namespace before them, or an address behind."""
    code = kind.partition(":")[0].rpartition("#")[2]
    plain = _ENDING.sub("", code).lower()
    found = replace(failure_of(400 if plain == "validation" else status, headers, told), status=status)
    known = _KINDS.get(plain)
    if known is None and found.kind is FailureKind.BAD_REQUEST and _NO_MODEL.search(told.words):
        known = FailureKind.NOT_FOUND
    if known is FailureKind.RATE_LIMITED and "per day" in told.words:
        known = FailureKind.QUOTA
    if known is not None:
        wait = retry_after_s(headers, told) if known in _WAITING else None
        found = replace(found, kind=known, retry_after_s=wait)
    return replace(found, code=clean_line(code)[:80])


def _inner_type(body: bytes) -> str:
    found = re.search(rb'"__type"\s{0,4}:\s{0,4}"([\w.#]{1,200})"', body[:4096])
    return found[1].decode() if found is not None else ""
