"""How a provider, or a whole attempt at a target, fails: one word for each way, which retries and breakers decide by.

Codecs and the providers' client raise ProviderFailure, the gateway decides what follows, and turns the last one into
an error of errors.py for the client. The table of what each kind does: cluster/gateway/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .errors import DiptychError


class FailureKind(StrEnum):
    """A way to fail."""

    BAD_REQUEST = "bad_request"  # the request is wrong wherever it goes: 400, 413, 422
    UNSUPPORTED = "unsupported"  # this target cannot express or do it, another one may
    CONTEXT_LENGTH = "context_length"
    CONTENT_POLICY = "content_policy"
    AUTH = "auth"  # 401, 403, a key that is missing
    NOT_FOUND = "not_found"  # no such model
    RATE_LIMITED = "rate_limited"
    QUOTA = "quota"  # paid for no more
    OVERLOADED = "overloaded"  # 503, 529
    SERVER = "server"  # 500, 502, 504, an answer that is none
    CONNECT = "connect"  # name, address, TLS
    FIRST_TOKEN_TIMEOUT = "timeout_first_token"
    IDLE_TIMEOUT = "timeout_idle"
    TOTAL_TIMEOUT = "timeout_total"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a provider's error says. `message` is for the client: one line, bounded, without keys. `status` 0: there was
    none. `param` is the field of the provider's request that it names. `code` is its own word.
    """

    kind: FailureKind
    message: str
    status: int = 0
    retry_after_s: float | None = None
    param: str = ""
    code: str = ""


class ProviderFailure(DiptychError):
    """An attempt at a target failed. Never reaches a client as it is."""

    code = "provider_failed"
    http_status = 502

    def __init__(self, failure: Failure, target: str = "", detail: str = "") -> None:
        DiptychError.__init__(self, failure.message, detail)
        self.args = (failure, target, detail)
        self.failure = failure
        self.target = target
