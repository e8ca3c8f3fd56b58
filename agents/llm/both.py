"""Things that are read with `for` or with `async for`, and what is made of their events. Streams are read by it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

U = TypeVar("U")


class Events(Protocol):
    """A stream that is read with `for` or with `async for`."""

    def __iter__(self) -> Iterator[Any]: ...
    def __aiter__(self) -> AsyncIterator[Any]: ...


class Both(Generic[U]):
    """Something to read with `for` or with `async for`, once."""

    def __init__(self, plain: Callable[[], Iterator[U]], waiting: Callable[[], AsyncIterator[U]]) -> None:
        self._plain = plain
        self._waiting = waiting

    def __iter__(self) -> Iterator[U]:
        return self._plain()

    def __aiter__(self) -> AsyncIterator[U]:
        return self._waiting()


def read_by(stream: Events, read: Callable[[Any], Iterable[U]]) -> Both[U]:
    """What `read` makes of each event; leaving it leaves the stream."""

    def plain() -> Iterator[U]:
        with contextlib.closing(cast("Generator[Any, None, None]", iter(stream))) as events:
            for event in events:
                yield from read(event)

    async def waiting() -> AsyncGenerator[U, None]:
        async with contextlib.aclosing(cast("AsyncGenerator[Any, None]", aiter(stream))) as events:
            async for event in events:
                for found in read(event):
                    yield found

    return Both(plain, waiting)
