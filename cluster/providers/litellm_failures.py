"""LiteLLM's exceptions as ProviderFailures: the one seam to that library's errors.

litellm_client.py calls it. Known by the names of their classes, which are the same in all versions; the words of an
error decide the rest, as they do of any provider of OpenAI's format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.providers.codec import Codec

from .network_failures import failed

_KINDS: Final[Mapping[str, FailureKind]] = {
    "ContextWindowExceededError": FailureKind.CONTEXT_LENGTH,
    "ContentPolicyViolationError": FailureKind.CONTENT_POLICY,
    "UnsupportedParamsError": FailureKind.UNSUPPORTED,
    "LiteLLMUnknownProvider": FailureKind.NOT_FOUND,
    "PaymentRequiredError": FailureKind.QUOTA,
    "BudgetExceededError": FailureKind.QUOTA,
    "APIResponseValidationError": FailureKind.SERVER,
    "Timeout": FailureKind.FIRST_TOKEN_TIMEOUT,
}
_NO_PROVIDER: Final = "LLM Provider NOT provided"
_NETWORK: Final = ("ConnectError", "ConnectTimeout", "ClientConnectorError", "gaierror", "ConnectionRefusedError")


def failure_of(exc: Exception, name: str, codec: Codec) -> ProviderFailure:
    """What an exception of LiteLLM says."""
    words = str(exc)
    status = getattr(exc, "status_code", None)
    status = status if isinstance(status, int) and status >= 400 else 0
    for cls in type(exc).__mro__:
        if cls.__name__ in _KINDS:
            return ProviderFailure(Failure(kind=_KINDS[cls.__name__], message=words, status=status))
    if _NO_PROVIDER in words:
        told = (
            f"{name}: LiteLLM knows no provider by the first part of that model's name: write PROVIDER/MODEL as it does"
        )
        return failed(FailureKind.NOT_FOUND, told, "provider", status)
    if _is_of_the_network(exc):
        return failed(FailureKind.CONNECT, f"{name} could not be reached by LiteLLM: {words}", "refused")
    if not status:
        return failed(FailureKind.SERVER, f"{name}: LiteLLM raised {type(exc).__name__}", "unreadable")
    body = json.dumps({"error": {"message": words, "code": getattr(exc, "code", None)}}).encode()
    return ProviderFailure(codec.failure(status, _headers(exc), body))


def _is_of_the_network(exc: BaseException) -> bool:
    """LiteLLM calls it an internal error of the server; what it was is told by what it came of."""
    seen: set[int] = set()
    inner: BaseException | None = exc
    while inner is not None and id(inner) not in seen:
        if type(inner).__name__ in _NETWORK:
            return True
        seen.add(id(inner))
        inner = inner.__cause__ or inner.__context__
    return False


def _headers(exc: Exception) -> dict[str, str]:
    found = getattr(exc, "litellm_response_headers", None)
    if found is None:
        found = getattr(getattr(exc, "response", None), "headers", None)
    try:
        return {str(name).lower(): str(value) for name, value in dict(found or {}).items()}
    except (TypeError, ValueError):
        return {}
