"""`llm.wrap`: clients of OpenAI and Anthropic that take response_model=, for those who come from Instructor.

Neither package is imported here, nor needed.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol, overload

from ..retries import Retries
from .client import AsyncWrapped, Pieces, Wrapped, wrapped
from .listeners import WrapHooks

__all__ = ["AsyncWrapped", "Pieces", "WrapHooks", "Wrapped", "wrap"]


class SyncClient(Protocol):
    """As openai.OpenAI and anthropic.Anthropic are."""

    def close(self) -> None:
        """Closes its connections."""


class AsyncClient(Protocol):
    """As openai.AsyncOpenAI and anthropic.AsyncAnthropic are."""

    def close(self) -> Coroutine[Any, Any, None]:
        """Closes its connections."""


@overload
def wrap(
    client: SyncClient,
    *,
    model: str | None = None,
    max_retries: int | Retries = 3,
    schemas: bool | None = None,
    hooks: WrapHooks | None = None,
) -> Wrapped: ...
@overload
def wrap(
    client: AsyncClient,
    *,
    model: str | None = None,
    max_retries: int | Retries = 3,
    schemas: bool | None = None,
    hooks: WrapHooks | None = None,
) -> AsyncWrapped: ...
def wrap(
    client: SyncClient | AsyncClient,
    *,
    model: str | None = None,
    max_retries: int | Retries = 3,
    schemas: bool | None = None,
    hooks: WrapHooks | None = None,
) -> Wrapped | AsyncWrapped:
    """The client of OpenAI or Anthropic, synchronous or not, with response_model= at its calls. It is not changed
    itself, and whatever is not said here is as it was.

    model         for calls that name none
    max_retries   attempts beyond the first of calls with a response_model, or llm.Retries; the client's own are off
    schemas       false: the server knows no JSON schemas; the model is told in words. None: as it is known to be
    hooks         handlers of events; see also `on`

    Raises UsageError for anything else than such a client.
    """
    return wrapped(client, model=model, max_retries=max_retries, schemas=schemas, hooks=hooks)
