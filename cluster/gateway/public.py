"""Failures of targets as the errors that clients get, and the errors of own pools as failures. Both tables: README.md.

What concerns this server's account at a provider (keys, quota, which models it may use) is told in our words alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diptych.protos.errors import (
    Cancelled,
    CapacityError,
    ContextTooLong,
    DeadlineExceeded,
    DiptychError,
    FirstTokenTimeout,
    InvalidRequest,
    Overloaded,
    OverShare,
    Quarantined,
    RateLimited,
    RequestError,
    UnknownModel,
    param_of,
)
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.replies import Usage

NO_KEY = "no_key"  # the code of a failure before anything was sent
_RETRY_AFTER_S = 1.0
_QUOTA_RETRY_AFTER_S = 600.0


class ContentPolicyViolation(RequestError):
    """A provider's filter refused the request or took the answer away."""

    code = "content_policy_violation"


class UpstreamFailed(DiptychError):
    """No target gave an answer; the last failure was its server's or on the way to it."""

    code = "upstream_failed"
    http_status = 502
    retryable = True


class UpstreamRefused(DiptychError):
    """A provider refuses this server itself: its key, or its model's name. The operator has to change something."""

    code = "upstream_refused"
    http_status = 502
    is_lasting = True


class AnswerBroken(UpstreamFailed):
    """An answer failed after its client had seen a part of it, and nothing went on with it. `kind` is how it failed,
    `usage` what is known to be paid for.
    """

    code = "answer_broken"

    def __init__(self, message: str, kind: FailureKind, usage: Usage, detail: str = "") -> None:
        DiptychError.__init__(self, message, detail)
        self.args = (message, kind, usage, detail)
        self.kind_of_failure = kind
        self.usage = usage


def public_error(exc: ProviderFailure) -> DiptychError:
    """What a client is told of the last failure of its request. An own pool's error is told as it was."""
    cause = exc.__cause__
    if isinstance(cause, DiptychError) and not isinstance(cause, ProviderFailure):
        return cause
    failure, target = exc.failure, exc.target or "the provider"
    words = failure.message
    if failure.kind in _OURS and failure.code != NO_KEY:  # NO_KEY: our own words, which name a variable and no key
        words = f"{target}: {_OURS[failure.kind]}"
    elif not words.startswith(target.partition("/")[0]):
        words = f"{target}: {words}"
    return _ERRORS[failure.kind](words, failure, exc.detail or failure.message)


# What concerns this server's account.
_OURS = {
    FailureKind.AUTH: "the provider does not accept this server's key; its operator has to set another one",
    FailureKind.NOT_FOUND: "the provider has no such model for this server; its operator has to change the route",
    FailureKind.QUOTA: "what this server may use of the provider is used up; its operator has to pay or wait",
}


def _wrong(words: str, failure: Failure, detail: str) -> DiptychError:
    return InvalidRequest(words, failure.param or None, detail)


def _refused(words: str, failure: Failure, detail: str) -> DiptychError:
    return UpstreamRefused(words, detail)


def _used_up(words: str, failure: Failure, detail: str) -> DiptychError:
    return Overloaded(words, failure.retry_after_s or _QUOTA_RETRY_AFTER_S, detail)


def _down(words: str, failure: Failure, detail: str) -> DiptychError:
    return UpstreamFailed(words, detail)


def _late(words: str, failure: Failure, detail: str) -> DiptychError:
    return DeadlineExceeded(words, detail)


_ERRORS: Mapping[FailureKind, Callable[[str, Failure, str], DiptychError]] = {
    FailureKind.BAD_REQUEST: _wrong,
    FailureKind.UNSUPPORTED: _wrong,
    FailureKind.CONTEXT_LENGTH: lambda words, failure, detail: ContextTooLong(words, failure.param or None, detail),
    FailureKind.CONTENT_POLICY: lambda words, failure, detail: ContentPolicyViolation(
        words, failure.param or None, detail
    ),
    FailureKind.AUTH: _refused,
    FailureKind.NOT_FOUND: _refused,
    FailureKind.QUOTA: _used_up,
    FailureKind.RATE_LIMITED: lambda words, failure, detail: RateLimited(
        words, failure.retry_after_s or _RETRY_AFTER_S, detail
    ),
    FailureKind.OVERLOADED: lambda words, failure, detail: Overloaded(
        words, failure.retry_after_s or _RETRY_AFTER_S, detail
    ),
    FailureKind.SERVER: _down,
    FailureKind.CONNECT: _down,
    FailureKind.FIRST_TOKEN_TIMEOUT: lambda words, failure, detail: FirstTokenTimeout(words, detail),
    FailureKind.IDLE_TIMEOUT: _late,
    FailureKind.TOTAL_TIMEOUT: _late,
    FailureKind.CANCELLED: lambda words, failure, detail: Cancelled(words, detail),
}


def broken(exc: ProviderFailure, usage: Usage, why: str) -> DiptychError:
    """The same for an answer of which a part was seen; `why` it did not go on."""
    if exc.failure.kind in (FailureKind.TOTAL_TIMEOUT, FailureKind.CANCELLED):
        return public_error(exc)
    told = public_error(exc)
    words = f"the answer broke off: {told.message}"
    return AnswerBroken(words, exc.failure.kind, usage, f"{told.detail}; not gone on with: {why or 'no target left'}")


def failure_of(exc: DiptychError, target: str) -> ProviderFailure:
    """An error of an own pool as a failure of that target; raise it from `exc`, which clients are then told."""
    if isinstance(exc, ProviderFailure):
        return exc
    retry_after_s = exc.retry_after_s if isinstance(exc, CapacityError) else None
    failure = Failure(
        kind=_kind(exc), message=exc.message, status=exc.http_status, retry_after_s=retry_after_s, param=param_of(exc)
    )
    return ProviderFailure(failure, target, exc.detail)


# The first that fits; a tree's leaves stand before its branches.
_KINDS: tuple[tuple[type[DiptychError], FailureKind], ...] = (
    (ContextTooLong, FailureKind.CONTEXT_LENGTH),
    (UnknownModel, FailureKind.NOT_FOUND),
    (Quarantined, FailureKind.UNSUPPORTED),
    (ContentPolicyViolation, FailureKind.CONTENT_POLICY),
    (RequestError, FailureKind.BAD_REQUEST),
    (OverShare, FailureKind.OVERLOADED),
    (RateLimited, FailureKind.RATE_LIMITED),
    (CapacityError, FailureKind.OVERLOADED),
    (FirstTokenTimeout, FailureKind.FIRST_TOKEN_TIMEOUT),
    (DeadlineExceeded, FailureKind.TOTAL_TIMEOUT),
    (Cancelled, FailureKind.CANCELLED),
)


def _kind(exc: DiptychError) -> FailureKind:
    return next((kind for cls, kind in _KINDS if isinstance(exc, cls)), FailureKind.SERVER)
