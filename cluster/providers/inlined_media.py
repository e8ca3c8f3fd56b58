"""Requests whose media are behind addresses, for providers that take bytes alone: fetched, and put in their place.

The gateway calls it before a codec encodes. What an address leads to is fetch.py's matter.
"""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, Protocol

from diptych.protos.errors import RequestTooLarge
from diptych.protos.messages import Kind, Media, Message, Part, ToolResult
from diptych.protos.openai import ChatRequest

from .fetch import Fetched, Fetcher
from .provider import Provider

MAX_AT_ONCE: Final = 4
MEDIA_TYPES: Final[dict[Kind, frozenset[str]]] = {
    "image": frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"}),
    "audio": frozenset({"audio/*"}),
    "file": frozenset({"application/pdf", "text/*", "application/json", "image/*"}),
}


class Fetch(Protocol):
    """Fetcher.fetch."""

    async def __call__(
        self, url: str, path: str, media_types: Collection[str], most_bytes: int | None = None
    ) -> Fetched:
        """See Fetcher.fetch."""


@asynccontextmanager
async def inlined_for(
    provider: Provider, request: ChatRequest, fetcher: Fetcher, *, wait_s: float
) -> AsyncIterator[ChatRequest]:
    """`inlined`, for what this provider does not read itself, with the fetcher's limits; its bytes have their room
    until the block's end. Raises Overloaded besides, where there is none within `wait_s`.
    """
    settings, reads = fetcher.settings, provider.reads_urls
    num_places = sum(1 for _ in _behind_addresses(request, reads))
    # Those that are on their way may be too many together; that shows when one is there.
    most_bytes = min(num_places * settings.max_bytes, settings.request_bytes + MAX_AT_ONCE * settings.max_bytes)
    async with fetcher.room.part(most_bytes, wait_s) as part:
        told, num_bytes = await _inlined(request, fetcher.fetch, reads=reads, most_bytes=settings.request_bytes)
        part.shrink(num_bytes)
        yield told


async def inlined(
    request: ChatRequest, fetch: Fetch, *, reads: Sequence[str] = (), most_bytes: int = 50 << 20
) -> ChatRequest:
    """`request` with the bytes of all media that are behind addresses, but for those that begin with one of `reads`,
    which the provider reads itself; the request itself where there are none. An address that is there twice is fetched
    once, and counts twice: so often it is sent. Raises InvalidRequest naming the field, RequestTooLarge for more than
    `most_bytes` together.
    """
    return (await _inlined(request, fetch, reads=reads, most_bytes=most_bytes))[0]


def _behind_addresses(request: ChatRequest, reads: Sequence[str]) -> Iterator[Media]:
    """As often as it is in the request."""
    for message in request.messages:
        for media in message.media:
            if media.url and not media.url.startswith(tuple(reads)):
                yield media


async def _inlined(
    request: ChatRequest, fetch: Fetch, *, reads: Sequence[str], most_bytes: int
) -> tuple[ChatRequest, int]:
    """And how many bytes were put in."""
    times = Counter((media.url, media.kind) for media in _behind_addresses(request, reads))
    if not times:
        return request, 0
    wanted = {(media.url, media.kind): media for media in _behind_addresses(request, reads)}
    places = asyncio.Semaphore(MAX_AT_ONCE)
    left_bytes = most_bytes

    async def one(media: Media) -> Fetched:
        nonlocal left_bytes
        async with places:
            found = await fetch(media.url, media.path, MEDIA_TYPES[media.kind])
        left_bytes -= len(found.data) * times[media.url, media.kind]
        if left_bytes < 0:
            raise RequestTooLarge(f"the files behind this request's addresses have more than {most_bytes} bytes")
        return found

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {key: group.create_task(one(media)) for key, media in wanted.items()}
    except BaseExceptionGroup as exc:
        raise _first(exc) from None
    found = {key: task.result() for key, task in tasks.items()}
    messages = tuple(_with_data(message, found) for message in request.messages)
    return request.model_copy(update={"messages": messages}), most_bytes - left_bytes


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _with_data(message: Message, found: dict[tuple[str, Kind], Fetched]) -> Message:
    if not any((media.url, media.kind) in found for media in message.media):
        return message
    return replace(message, parts=tuple(_part(part, found) for part in message.parts))


def _part(part: Part, found: dict[tuple[str, Kind], Fetched]) -> Part:
    if isinstance(part, ToolResult):
        return replace(
            part, parts=tuple(_media(inner, found) if isinstance(inner, Media) else inner for inner in part.parts)
        )
    return _media(part, found) if isinstance(part, Media) else part


def _media(media: Media, found: dict[tuple[str, Kind], Fetched]) -> Media:
    fetched = found.get((media.url, media.kind))
    if fetched is None:
        return media
    data = base64.b64encode(fetched.data).decode()
    return replace(media, url="", data=data, media_type=fetched.media_type)
