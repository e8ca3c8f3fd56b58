"""What providers' errors have in common, whatever their format: where the message stands, a clean line made of it, when
to come again, what a status alone says.

Called by the codecs' `failure` and where an answer holds an error. Which words mean what is known to failure_words.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from diptych.protos.failures import FailureKind
from diptych.protos.strict_json import printable

MAX_MESSAGE_CHARS = 400
_MAX_BODY_BYTES = 1 << 20  # of an error, that are looked at: some repeat the request
_MAX_TEXT_CHARS = 16 << 10  # of its words
_LONGEST_WAIT_S = 86_400.0

# What keys look like: known beginnings; masks; runs that no word is; what is called a key.
_KEYS = (
    re.compile(r"(?i)\bbearer\s+[^\s\"',;]+"),
    re.compile(
        r"\b(?:sk|pk|rk|gsk|xai|hf|fw|fw_|csk|nvapi|pplx|r8|tgp|dop|ak|AKIA|ASIA|AIza|ya29|eyJ|ghp|glpat)[-_.]?[\w.*+/=-]{12,}"
    ),
    re.compile(r"[\w.-]*\*{3,}[\w.*-]*"),
    re.compile(r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"),
    re.compile(r"(?<![\w/])(?=[\w+]*[0-9])(?=[\w+]*[A-Za-z])[\w+]{24,}={0,2}"),
    re.compile(r"(?i)(?<=\bprovided: )[^\s\"',;]{6,}(?<![.])"),
    re.compile(
        r"(?i)((?:api[-_ ]?key|secret|password|authorization|access[-_ ]?token)[\"']?\s{0,2}[:=]\s{0,2})"
        r"[\"']?[^\s\"',;]{6,}"
    ),
)
# The fields in which a message, or what holds it, stands; the first is the most telling.
_MESSAGES = tuple("message error detail details msg error_message title errors reason Message".split())
_TAGS = re.compile(r"<(?:script|style)\b.{0,4000}?</(?:script|style)>|<[^<>]{0,2000}>", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,300})", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?"
)
_AGAIN = re.compile(r"(?i)\b(?:try again|retry)(?: in| after)\s+((?:\d+(?:\.\d+)?(?:ms|h|m|s))+|\d+(?:\.\d+)?)")
# The names under which providers say of requests and of tokens what is left and when there is more.
_LIMITS = (
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
    ("ratelimit-remaining", "ratelimit-reset"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An error as a provider tells it. `words` are all of them, for who looks for some; `message` is for people."""

    message: str = ""
    type: str = ""
    code: str = ""
    param: str = ""
    status: int = 0  # that the body names
    words: str = ""
    retry_after_s: float | None = None


def told_in(body: bytes) -> Told:
    """The error in an answer's body, whatever that is."""
    text = body[:_MAX_BODY_BYTES].decode("utf-8", "replace").lstrip("\ufeff").strip()
    if text[:1] in ("{", "[", '"'):
        try:
            return told_by(json.loads(text))
        except (ValueError, RecursionError):
            pass
    if not text:
        return Told()
    if sum(not (c.isprintable() or c.isspace()) or c == "\ufffd" for c in text[:400]) > min(len(text), 400) // 10:
        return Told(message=f"an answer of {len(body)} bytes that are no text")
    text = text[:_MAX_TEXT_CHARS]
    if text.startswith("<"):
        title = _TITLE.search(text)
        text = title[1] if title else _TAGS.sub(" ", text)
    text = " ".join(text.split())
    return Told(message=text, words=text)


def told_by(value: Any) -> Told:
    """The error in JSON of any of the shapes in which it comes."""
    if isinstance(value, list):
        value = value[0] if value else {}
    if isinstance(value, str):
        return Told(message=value, words=value[:_MAX_TEXT_CHARS])
    if not isinstance(value, dict):
        return Told()
    inner = value.get("error")
    error = inner if isinstance(inner, dict) else value
    messages = [message for message in _messages(value) if message]
    code = _word(error, "code") or _word(error, "Code") or _word(value, "code")
    kind = _word(error, "type") or _word(error, "status") or (_word(error, "object") if error is value else "")
    innermost = error.get("innererror")  # Azure's
    deep = innermost if isinstance(innermost, dict) else {}
    words = [*messages, code, kind, _word(deep, "code"), _word(error, "param"), _word(error, "error_type")]
    if isinstance(inner, str):
        code = code or (inner if " " not in inner and len(messages) > 1 else "")
    return Told(
        message=max(messages[:2], key=_rank, default="") if messages else "",
        type=kind,
        code=_word(deep, "code") or code,
        param=_word(error, "param"),
        status=next(
            (s for s in (_status(error.get(k)) for k in ("code", "status_code", "status", "statusCode")) if s), 0
        ),
        words=" ".join(word for word in words if word)[:_MAX_TEXT_CHARS],
        retry_after_s=_delay_in(error),
    )


def _rank(message: str) -> bool:
    """A sentence tells more than a word."""
    return " " in message


def _messages(value: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """The first is the most telling."""
    metadata = value.get("metadata")
    if depth < 4 and isinstance(metadata, dict) and isinstance(raw := metadata.get("raw"), str):
        yield told_in(raw.encode("utf-8", "replace")).words  # OpenRouter's: what the provider behind it said
        yield from (reason for reason in metadata.get("reasons") or () if isinstance(reason, str))
    for name in _MESSAGES:
        found = value.get(name)
        if isinstance(found, list):
            found = next((entry for entry in found if isinstance(entry, dict | str)), None)
            if isinstance(found, dict) and isinstance(found.get("loc"), list) and isinstance(found.get("msg"), str):
                yield f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
                continue
        if isinstance(found, str):
            nested = found.strip()
            if depth < 4 and nested.startswith("{") and nested.endswith("}"):
                yield told_in(nested.encode("utf-8", "replace")).words
            yield found
        elif isinstance(found, dict) and depth < 4:
            yield from _messages(found, depth + 1)


def _word(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    return printable(found, 120) if isinstance(found, str) else ""


def _status(value: object) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) == 3:
        value = int(value)
    return value if type(value) is int and 400 <= value <= 599 else 0


def _delay_in(error: Mapping[str, Any]) -> float | None:
    """Google's RetryInfo."""
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and isinstance(delay := detail.get("retryDelay"), str):
            return _seconds(delay)
    return None


def clean_line(text: str) -> str:
    """`text` for a client: one line, bounded, without anything that looks like a key."""
    line = " ".join(text[: 4 * MAX_MESSAGE_CHARS].split())
    for pattern in _KEYS:
        line = pattern.sub(lambda found: (found[1] if found.re.groups else "") + "[key]", line)
    return printable(line, MAX_MESSAGE_CHARS)


def retry_after_s(headers: Mapping[str, str], told: Told) -> float | None:
    """Seconds until a request may be sent again, by the headers (in lower case) or the words; None: nobody says."""
    found = _milliseconds(headers.get("retry-after-ms"))
    if found is None and (wait := headers.get("retry-after")) is not None:
        found = _seconds(wait) if _until(wait, headers) is None else _until(wait, headers)
    if found is None:
        found = told.retry_after_s
    if found is None and (again := _AGAIN.search(told.words)) is not None:
        found = _seconds(again[1])
    if found is None:
        found = _of_limits(headers)
    return None if found is None else min(max(found, 0.0), _LONGEST_WAIT_S)


def _of_limits(headers: Mapping[str, str]) -> float | None:
    """When what is used up is there again; where none is said to be used up, the soonest."""
    waits: list[tuple[bool, float]] = []
    for remaining, reset in _LIMITS:
        value = headers.get(reset)
        wait = None if value is None else _epoch(value, headers) or _seconds(value)
        if wait is not None:
            left = _NUMBER.match(headers.get(remaining, ""))
            waits.append((left is not None and float(left[0]) <= 0, wait))
    used_up = [wait for is_used_up, wait in waits if is_used_up]
    return max(used_up) if used_up else min((wait for _, wait in waits), default=None)


def _milliseconds(value: str | None) -> float | None:
    number = _NUMBER.fullmatch(value.strip()) if value is not None else None
    return None if number is None else float(number[0]) / 1000


def _seconds(value: str) -> float | None:
    """Of a number, or of a duration such as 6m0s, 120ms."""
    text = value.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        return None
    return sum(float(n or 0) * unit for n, unit in zip(found.groups(), (86_400, 3600, 60, 1, 0.001), strict=True))


def _until(value: str, headers: Mapping[str, str]) -> float | None:
    """Of an HTTP date, by the answer's own clock."""
    try:
        then, now = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        return (then - now).total_seconds()
    except (ValueError, TypeError, IndexError):  # the parser's ways to refuse, and dates with and without a zone
        return None


def _epoch(value: str, headers: Mapping[str, str]) -> float | None:
    """Of a point in time in seconds or milliseconds since 1970, by the answer's own clock."""
    number = _NUMBER.fullmatch(value.strip())
    if number is None or float(number[0]) < 1e9:
        return None
    then = float(number[0]) / (1000 if float(number[0]) > 1e11 else 1)
    try:
        return then - parsedate_to_datetime(headers.get("date", "")).timestamp()
    except (ValueError, TypeError, IndexError):
        return 0.0


def kind_of_status(status: int) -> FailureKind:
    """What a status says when no word says more; 0 is an error without one."""
    known = {
        401: FailureKind.AUTH,
        402: FailureKind.QUOTA,
        403: FailureKind.AUTH,
        404: FailureKind.NOT_FOUND,
        405: FailureKind.UNSUPPORTED,
        429: FailureKind.RATE_LIMITED,
        498: FailureKind.OVERLOADED,
        501: FailureKind.UNSUPPORTED,
        503: FailureKind.OVERLOADED,
        529: FailureKind.OVERLOADED,
    }
    if status in known:
        return known[status]
    is_answer_to_request = 400 <= status < 500 and status not in (408, 409, 424, 425, 499)
    return FailureKind.BAD_REQUEST if is_answer_to_request else FailureKind.SERVER
