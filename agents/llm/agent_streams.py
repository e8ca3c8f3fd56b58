"""A run of an agent as it goes on: one object, read with `for` or with `async for`.

agent.py's `stream` gives it. It is to Loop what streams.py's Stream is to a call.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from .agent_events import Happened, Run, RunEnded, TextDelta, TurnBegan
from .agent_loop import Flow, Guarded, Open, Tell
from .background import background
from .both import Both, read_by
from .errors import UsageError
from .machine import Machine, Step, verb
from .streams import Pieces
from .together import Aside

T = TypeVar("T")


class AgentStream(Generic[T]):
    """The events of one run, read once. Leaving the `with` block, or closing an iterator, cancels tools that are
    running and closes the connection.
    """

    def __init__(self, name: str, begin: Callable[[], tuple[Flow[Run[T]], Open]]) -> None:
        self.name = name
        self._begin = begin
        self._flow: Flow[Run[T]] | None = None
        self._open: Open | None = None
        self._run: Run[T] | None = None

    def __iter__(self) -> Iterator[Happened | RunEnded[T]]:
        flow = self._begun()
        try:
            item = next(flow)
            while True:
                if (event := self._told(item)) is not None:
                    yield event
                    item = flow.send(None)
                    continue
                try:
                    found = background.run(self._guarded(item).perform())
                except Exception as exc:
                    item = flow.throw(exc)
                else:
                    item = flow.send(found)
        except StopIteration:
            return
        finally:
            self.close()

    async def __aiter__(self) -> AsyncGenerator[Happened | RunEnded[T], None]:
        flow = self._begun()
        try:
            item = next(flow)
            while True:
                if (event := self._told(item)) is not None:
                    yield event
                    item = flow.send(None)
                    continue
                try:
                    found = await self._guarded(item).perform()
                except Exception as exc:
                    item = flow.throw(exc)
                else:
                    item = flow.send(found)
        except StopIteration:
            return
        finally:
            await self.aclose()

    def text(self) -> Both[str]:
        """The pieces of the text alone, none of them twice. Raises the cause of a restart after which a turn says
        something else than was given already.
        """

        return read_by(self, _Turns().taken)

    @verb
    def run(self, /) -> Machine[Run[T]]:
        """What the run gave; what is left of it is read to the end. Raises UsageError where it was left before."""
        if self._run is None:
            flow = self._begun() if self._flow is None else self._flow
            try:
                item = flow.send(None)
                while True:
                    if self._told(item) is not None:
                        item = flow.send(None)
                        continue
                    try:
                        found = yield self._guarded(item)
                    except Exception as exc:
                        item = flow.throw(exc)
                    else:
                        item = flow.send(found)
            except StopIteration:
                pass
        if self._run is None:
            raise UsageError(f"{self.name}: this stream was left before its end, so that there is no run")
        return self._run

    def _begun(self) -> Flow[Run[T]]:
        if self._flow is not None:
            raise UsageError(f"{self.name}: this stream is being read already, or was; call .stream(...) again")
        self._flow, self._open = self._begin()
        return self._flow

    def _told(self, item: Step[Any] | Aside) -> Happened | RunEnded[T] | None:
        if not isinstance(item, Tell):
            return None
        if isinstance(item.event, RunEnded):
            self._run = item.event.run
        return item.event

    def _guarded(self, item: Any) -> Step[Any]:
        assert self._open is not None
        return Guarded(item, self._open)

    def close(self) -> None:
        """Of a stream that is read with `for`."""
        if (left := self._left()) is not None:
            background.run(left.close())

    async def aclose(self) -> None:
        """Of a stream that is read with `async for`."""
        if (left := self._left()) is not None:
            await left.close()

    def _left(self) -> Open | None:
        if self._flow is not None:
            self._flow.close()
        left = self._open
        return left if left is not None and (left.streams or left.running) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Turns:
    """The texts of a run's turns; each of them may begin anew."""

    def __init__(self) -> None:
        self._pieces = Pieces(TextDelta)

    def taken(self, event: object) -> Iterator[str]:
        """What of it is new."""
        if isinstance(event, TurnBegan | RunEnded):
            self._pieces.over()
            self._pieces = Pieces(TextDelta)
        yield from self._pieces.taken(event)
