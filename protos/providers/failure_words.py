"""The words by which providers tell why they failed: codes, types, and pieces of sentences, to kinds of failure.

Gathered from the vendors' pages on errors and their users' reports, as of 2026-11. The order of the table decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from diptych.protos.failures import Failure, FailureKind

from .error_bodies import Told, clean_line, kind_of_status, retry_after_s

_BY_CODE: dict[FailureKind, frozenset[str]] = {
    FailureKind.CONTEXT_LENGTH: frozenset("context_length_exceeded exceed_context_size_error context_too_long".split()),
    FailureKind.CONTENT_POLICY: frozenset(
        "content_filter content_policy_violation content_policy responsibleaipolicyviolation data_inspection_failed "
        "datainspectionfailed moderation_blocked invalid_prompt content_moderation prohibited_content".split()
    ),
    FailureKind.QUOTA: frozenset(
        "insufficient_quota billing_hard_limit_reached billing_not_active insufficient_balance arrearage "
        "credit_limit exceeded_current_quota_error access_terminated billing_error".split()
    ),
    FailureKind.OVERLOADED: frozenset(
        "overloaded overloaded_error engine_overloaded_error engine_overloaded model_overloaded server_busy "
        "server_overloaded capacity_exceeded slow_down unavailable service_unavailable".split()
    ),
    FailureKind.AUTH: frozenset(
        "invalid_api_key authentication_error invalid_authentication_error permission_error permissiondenied "
        "permission_denied unauthorized unauthenticated api_key_invalid invalid_authentication_token "
        "unsupported_country_region_territory".split()
    ),
    FailureKind.NOT_FOUND: frozenset(
        "model_not_found not_found not_found_error deploymentnotfound model_not_exist notfounderror "
        "model_not_available resource_not_found_error".split()
    ),
    FailureKind.RATE_LIMITED: frozenset(
        "rate_limit_exceeded rate_limit_error rate_limit_reached_error rate_limited ratelimiterror too_many_requests "
        "resource_exhausted requests tokens throttlingexception toomanyrequests".split()
    ),
    FailureKind.UNSUPPORTED: frozenset(
        "unsupported_parameter unsupported_value unknown_parameter extra_forbidden".split()
    ),
    FailureKind.BAD_REQUEST: frozenset(
        "invalid_request_error invalid_argument badrequesterror invalid_json_schema".split()
    ),
}
_CONTEXT = re.compile(
    r"(?i)maximum context length|context window|context size|context_length|context length|prompt is too long|"
    r"input is too long|too many (?:input )?tokens|maximum prompt length|(?:exceeds?|exceeded)[^.]{0,60}"
    r"(?:token limit|maximum (?:number of )?(?:input )?tokens|number of tokens allowed|input length)|"
    r"range of input length|tokens? \+ .?max_new_tokens.? must be|longer than the model'?s|"
    r"prompt contains \d+ tokens|reduce the length of the (?:messages|prompt|input)|input length and .?max_tokens"
)
_CONTENT = re.compile(
    r"(?i)content management policy|content[ _-]?filter|content policy|content exists risk|usage polic|"
    r"flagged (?:as|by|for|due)|requires moderation|inappropriate content|safety (?:system|filter)"
)
_QUOTA = re.compile(
    r"(?i)insufficient[ _](?:balance|credits?|quota|funds)|exceeded your current quota|credit balance|"
    r"out of credits?|not enough credits|requires more credits|spending (?:limit|cap)|billing|in arrears|"
    r"quota (?:is )?exhausted"
)
_AUTH = re.compile(
    r"(?i)(?:incorrect|invalid|missing|no|expired|revoked) api[ _-]?key|api[ _-]?key (?:is )?(?:not valid|invalid|"
    r"missing|required|expired)|invalid (?:authentication|credentials|token)|unauthori[sz]ed"
)
_NOT_FOUND = re.compile(
    r"(?i)model[^.]{0,120}(?:does not exist|not exist\b|not found|is not available|has been (?:deprecated|"
    r"decommissioned|removed)|no longer)|(?:unknown|no such|invalid|unrecognized) model|not a valid model|"
    r"no endpoints found|deployment[^.]{0,60}does not exist"
)
_UNSUPPORTED = re.compile(
    r"(?i)unsupported (?:parameter|value|field)|unrecognized (?:request )?(?:argument|parameter|field)|"
    r"extra inputs are not permitted|(?:does not|doesn't|not) (?:yet )?support|(?:is|are) (?:not |un)supported|"
    r"unknown (?:parameter|field|name)|not permitted"
)
_BUSY = re.compile(
    r"(?i)overload|at capacity|over capacity|model is (?:currently )?loading|no healthy upstream|server is busy"
)
_RATE = re.compile(r"(?i)rate limit|too many requests|tokens per (?:minute|day)|requests per (?:minute|day)")


def failure_of(status: int, headers: Mapping[str, str], told: Told) -> Failure:
    """The failure that a provider's error tells; `status` 0 or below 400: it came within an answer."""
    seen = status if status >= 400 else told.status
    kind = _kind(seen, told)
    message = clean_line(told.message) or (
        f"HTTP status {status}, without a word" if status else "an error without a word"
    )
    waits = kind in (FailureKind.RATE_LIMITED, FailureKind.OVERLOADED, FailureKind.QUOTA, FailureKind.SERVER)
    return Failure(
        kind=kind,
        message=message,
        status=seen,
        retry_after_s=retry_after_s(headers, told) if waits else None,
        param=clean_line(told.param),
        code=clean_line(told.code or told.type)[:80],
    )


def _kind(status: int, told: Told) -> FailureKind:
    by_code = _of_codes(told)
    words = told.words
    may_blame_request = status in (0, 400, 403, 404, 413, 422) or status >= 500
    if by_code in (FailureKind.CONTEXT_LENGTH, FailureKind.CONTENT_POLICY):
        return by_code
    if status == 429 or by_code is FailureKind.RATE_LIMITED:
        return _of_429(told, by_code)
    if may_blame_request and _CONTEXT.search(words) and not _RATE.search(words):
        return FailureKind.CONTEXT_LENGTH
    if may_blame_request and _CONTENT.search(words):
        return FailureKind.CONTENT_POLICY
    if by_code is FailureKind.QUOTA or status == 402:
        return FailureKind.QUOTA
    if status in (0, 400, 403, 404, 422) and (kind := _of_refusal(status, words, by_code)) is not None:
        return kind
    if by_code is FailureKind.OVERLOADED or (status in (0, 500, 502) and _BUSY.search(words)):
        return FailureKind.OVERLOADED
    if status == 0:
        return by_code or (FailureKind.RATE_LIMITED if _RATE.search(words) else FailureKind.SERVER)
    if by_code is not None and status == 400:
        return by_code
    return kind_of_status(status)


def _of_refusal(status: int, words: str, by_code: FailureKind | None) -> FailureKind | None:
    """Statuses for wrong requests are used for anything."""
    for pattern, kind in ((_QUOTA, FailureKind.QUOTA), (_NOT_FOUND, FailureKind.NOT_FOUND), (_AUTH, FailureKind.AUTH)):
        if pattern.search(words):
            return kind
    if status != 404 and (_UNSUPPORTED.search(words) or by_code is FailureKind.UNSUPPORTED):
        return FailureKind.UNSUPPORTED
    return None


def _of_429(told: Told, by_code: FailureKind | None) -> FailureKind:
    """Too many requests, or more than that. Google says of every limit that a quota was exceeded."""
    if by_code in (FailureKind.OVERLOADED, FailureKind.QUOTA):
        return by_code
    is_passing = told.type.upper() == "RESOURCE_EXHAUSTED" or told.retry_after_s is not None
    if _QUOTA.search(told.words) and not is_passing and by_code is None:
        return FailureKind.QUOTA
    return FailureKind.OVERLOADED if _BUSY.search(told.words) else FailureKind.RATE_LIMITED


def _of_codes(told: Told) -> FailureKind | None:
    names = {told.code.lower(), told.type.lower()}
    for kind, codes in _BY_CODE.items():
        if names & codes:
            return kind
    return None
