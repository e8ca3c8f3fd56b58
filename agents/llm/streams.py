"""Answers as they come: one stream object, read with `for` or with `async for`.

The twin of exchange.py. What it yields are the events of protos/replies.py, and two more: Restarted, after which the
answer begins anew, and Finished, the last, with the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

from pydantic import BaseModel, RootModel

from diptych.cluster.gateway.restoring import restoring
from diptych.protos.deltas import Content, Reasoning
from diptych.protos.failures import ProviderFailure
from diptych.protos.messages import Message
from diptych.protos.replies import Began, Event, ReplyBuilder
from diptych.protos.replies import Reply as Answer

from .assembling import Assembler, Items
from .background import background
from .both import Both, read_by
from .cache import recalled
from .draft import Draft, Encoded
from .errors import CallFailed, UsageError
from .exchange import Trying, provider_error, too_late
from .machine import Machine, Sleep, Step, take, verb
from .output import Output
from .partial import Partial
from .reasking import joined
from .reply import Reply
from .upstream import Limits, Wire
from .usage import spent_of
from .watch import watching

T = TypeVar("T")
U = TypeVar("U")
M = TypeVar("M", bound=BaseModel)
N = TypeVar("N", bound=RootModel[Any])
_MOST_WAITING = 1024  # events that a reader has not taken; then the connection is not read


@dataclass(frozen=True, slots=True)
class Restarted:
    """What came before does not count: the answer begins anew, because of `error`, as attempt `number`. Where it goes
    on from a beginning that is kept (`why` is repair or longer), that comes first, as one Content. A failure before
    anything was told is not told either; `reply.attempts` has it.
    """

    number: int
    why: str
    error: CallFailed


@dataclass(frozen=True, slots=True)
class Finished(Generic[T]):
    """The last event."""

    reply: Reply[T]


StreamEvent = Event | Restarted | Finished[T]


@dataclass(frozen=True, slots=True)
class Emit:
    """What a stream's machine has for its reader. `has_more`: another one came with it."""

    event: StreamEvent[Any]
    has_more: bool = False


class Source:
    """An upstream's events, read ahead by a task of the running loop, and taken in batches. The task owns the
    connection: it closes with the task's end, however that comes.
    """

    def __init__(self, events: AsyncGenerator[Event, None], total_s: float | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._events = events
        self._until = None if total_s is None else self.loop.time() + total_s
        self._waiting: deque[Event] = deque()
        self._has_more = asyncio.Event()
        self._has_room = asyncio.Event()
        self._error: BaseException | None = None
        self._is_over = False
        self._task = self.loop.create_task(self._read())

    async def _read(self) -> None:
        try:
            async with contextlib.aclosing(self._events) as events, asyncio.timeout_at(self._until):
                async for event in events:
                    self._waiting.append(event)
                    self._has_more.set()
                    if len(self._waiting) >= _MOST_WAITING:
                        self._has_room.clear()
                        await self._has_room.wait()
        except TimeoutError:
            self._error = too_late()
        except Exception as exc:
            self._error = exc
        finally:
            self._is_over = True
            self._has_more.set()

    async def batch(self) -> list[Event]:
        """All that is there, at least one; empty at the end. Raises what the upstream raised; UsageError on another
        loop than the one that the stream began on.
        """
        if asyncio.get_running_loop() is not self.loop:
            raise UsageError(
                "a stream is read to its end as it was begun: with `for` and reply(), or with `async for` and "
                "reply.aio(), on one event loop"
            )
        while not self._waiting:
            if self._is_over or self._task.done():
                if self._error is not None:
                    raise self._error
                return []
            self._has_more.clear()
            await self._has_more.wait()
        found = list(self._waiting)
        self._waiting.clear()
        self._has_room.set()
        return found

    async def close(self) -> None:
        """Ends the reading, and the connection with it; waits until it is closed, where that is on the running loop."""
        if asyncio.get_running_loop() is not self.loop:
            self.abandon()
            return
        self._task.cancel()
        await asyncio.wait([self._task])

    def abandon(self) -> None:
        """The same from anywhere, without waiting."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and all that was in it
            self.loop.call_soon_threadsafe(self._task.cancel)


@dataclass(slots=True)
class Open:
    """A step: the events of a request begin."""

    sent: Encoded
    limits: Limits
    wire: Wire
    run: _Run[Any]

    async def perform(self) -> Source:
        """Ask for them. Who closes the stream meanwhile, in another thread, finds the source or is found here."""
        events = self.sent.upstream.stream(self.sent.outgoing, self.limits, self.wire)
        undone = restoring(self.sent.request, self.sent.outgoing.notes)
        source = self.run.source = Source(events if undone is None else undone.events(events), self.limits.total_s)
        if self.run.is_left:
            source.abandon()
        return source


@dataclass(slots=True)
class Batch:
    """A step: the next events."""

    source: Source

    async def perform(self) -> list[Event]:
        """Wait for them."""
        return await self.source.batch()


@dataclass(slots=True)
class Closing:
    """A step: the connection goes."""

    source: Source

    async def perform(self) -> None:
        """Close it."""
        await self.source.close()


Flow = Generator[Step[Any] | Emit, Any, Reply[T]]


class _Told:
    """What the reader has seen of the present attempt. Its first event is held back until there is another, so that an
    attempt that failed before it said anything leaves no trace; `begun`, the beginning that the answer goes on from,
    comes between them.
    """

    def __init__(self, begun: Message | None) -> None:
        self.builder = ReplyBuilder()
        self.has_any = False
        self.has_come = False
        self._began: list[Event] = []
        self._begun = begun

    def seen(self, event: Event) -> list[Event]:
        """What to tell, now that `event` came."""
        self.has_come = True
        self.builder.add(event)
        if self.has_any:
            return [event]
        if isinstance(event, Began):
            self._began.append(event)
            return []
        self.has_any = True
        thoughts = "" if self._begun is None else self._begun.reasoning_content
        return [
            *self._began,
            *([Reasoning(thoughts)] if thoughts else []),
            *([] if self._begun is None else [Content(self._begun.content)]),
            event,
        ]


class _Run(Generic[T]):
    """The machine of a stream, and the source that must be closed when its reader leaves."""

    def __init__(self, begin: Callable[[], Machine[Draft[T]]]) -> None:
        self.source: Source | None = None
        self.is_left = False
        self.reads_parts = False
        self.validation: Any = None
        self._begin = begin

    def flow(self) -> Flow[T]:
        """All attempts. Ends with the reply, or raises CallFailed."""
        draft = yield from self._begin()
        self.validation = draft.validation
        if self.reads_parts:
            draft = replace(draft, reads_parts=True)
        with watching(draft, stream=True) as watch:
            memory = yield from recalled(draft)
            if memory.reply is not None:
                for event in memory.reply.answer.events():
                    yield Emit(event, has_more=True)
                yield Emit(Finished(watch.ended(memory.reply)))
                return memory.reply
            trying, restarted = Trying(draft, watch), None
            is_told = False
            while True:
                told = _Told(trying.draft.begun)
                answer: Answer | None = None
                try:
                    yield from self._attempt(trying, told, restarted)
                    answer = joined(trying.draft.begun, told.builder.reply())
                    result = trying.value(answer)
                except ProviderFailure as exc:
                    error: CallFailed = provider_error(exc, trying.draft)
                    if told.has_come:
                        answer = joined(trying.draft.begun, told.builder.reply())
                except CallFailed as exc:
                    if answer is None or exc.attempts:  # no attempt was made, or it is a validator's call that failed
                        raise
                    error = exc
                else:
                    reply = yield from memory.keep(trying.succeeded(answer, result))
                    yield Emit(Finished(reply))
                    return reply
                is_told = is_told or told.has_any
                step = trying.failed(answer, error)
                restarted = Restarted(trying.number, step.why, trying.course.failed(error)) if is_told else None
                if step.pause_s:
                    yield from take(Sleep(step.pause_s))

    def _attempt(
        self, trying: Trying[T], told: _Told, restarted: Restarted | None
    ) -> Generator[Step[Any] | Emit, Any, None]:
        with (yield from trying.place()) as place:
            sent, limits = yield from trying.begin(stream=True)
            if restarted is not None:
                yield Emit(restarted)
            source = yield from take(Open(sent, limits, trying.wire, self))
            try:
                while batch := (yield from take(Batch(source))):
                    for num_seen, event in enumerate(batch, 1):
                        for shown in told.seen(event):
                            yield Emit(shown, num_seen < len(batch))
            except Exception:
                yield from self._closed()
                raise
            finally:
                place.tokens = spent_of(told.builder.usage, None).tokens
            yield from self._closed()

    def _closed(self) -> Machine[None]:
        source, self.source = self.source, None
        if source is not None:
            yield from take(Closing(source))


class _Over(Exception):
    """A machine has come to its end."""


class Pieces:
    """Texts of one kind of event, none of them twice; see Stream.text."""

    def __init__(self, kind: type[Any]) -> None:
        self._kind = kind
        self._given: list[str] = []
        self._due = ""  # what an answer that began anew has to say first
        self._at = 0  # of it
        self._why: CallFailed | None = None

    def taken(self, event: object) -> Iterator[str]:
        """What of it is new. Raises the restart's cause where it is another text than was given."""
        if isinstance(event, Restarted):
            self._due, self._at, self._why = "".join(self._given), 0, event.error
        elif isinstance(event, self._kind):
            known = event.text[: len(self._due) - self._at]
            if not self._due.startswith(known, self._at):
                raise self._why or UsageError("another text after the one that was given")
            self._at += len(known)
            if piece := event.text[len(known) :]:
                self._given.append(piece)
                yield piece
        elif isinstance(event, Finished):
            self.over()

    def over(self) -> None:
        """The answer is. Raises the restart's cause where it is shorter than what was given."""
        if self._at < len(self._due):
            raise self._why or UsageError("another text after the one that was given")


class Stream(Generic[T]):
    """One answer as it comes. Leaving the `with` block, a loop over it, or its task closes the connection; a cluster
    stops generating and frees the request's KV then. A reader that is slower than the model is waited for: the
    connection is not read any further than some events ahead.
    """

    def __init__(self, begin: Callable[[], Machine[Draft[T]]], name: str, output: Output[T] | None) -> None:
        self.name = name
        self.output = output
        self._run = _Run(begin)
        self._flow: Flow[T] | None = None
        self._has_more = False  # events that came with the one that is read
        self._reply: Reply[T] | None = None
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[StreamEvent[T]]:
        flow = self._begun()
        try:
            step = self._on(flow, None)
            while True:
                if isinstance(step, Emit):
                    yield step.event
                    step = self._on(flow, None)
                    continue
                try:
                    found = background.run(step.perform())
                except Exception as exc:
                    step = self._on(flow, exc, is_error=True)
                else:
                    step = self._on(flow, found)
        except _Over:
            return
        finally:
            self.close()

    async def __aiter__(self) -> AsyncGenerator[StreamEvent[T], None]:
        flow = self._begun()
        try:
            step = self._on(flow, None)
            while True:
                if isinstance(step, Emit):
                    yield step.event
                    step = self._on(flow, None)
                    continue
                try:
                    found = await step.perform()
                except Exception as exc:
                    step = self._on(flow, exc, is_error=True)
                else:
                    step = self._on(flow, found)
        except _Over:
            return
        finally:
            await self.aclose()

    def _on(self, flow: Flow[T], found: Any, *, is_error: bool = False) -> Step[Any] | Emit:
        """The machine's next step. What it ends with is kept for `reply`."""
        if self._run.is_left:  # by close() in another thread, in the midst of a step
            flow.close()
            raise _Over
        try:
            step = flow.throw(found) if is_error else flow.send(found)
        except StopIteration:
            raise _Over from None
        except Exception as exc:
            self._error = exc
            raise
        if isinstance(step, Emit):
            self._has_more = step.has_more
            if isinstance(step.event, Finished):
                self._reply = step.event.reply
        return step

    def _begun(self) -> Flow[T]:
        if self._flow is not None:
            raise UsageError(f"{self.name}: this stream is being read already, or was; call .stream(...) again")
        self._flow = self._run.flow()
        return self._flow

    def flow(self) -> Flow[T]:
        """For a machine that reads it: its events are Emits among the steps. Its owner closes the stream."""
        return self._begun()

    def text(self) -> Both[str]:
        """The pieces of the text, which join to one answer's: after a restart those that were given are passed over.
        Raises what caused the restart where the answer then begins otherwise: read events to go on from there.
        """
        return read_by(self, Pieces(Content).taken)

    def thoughts(self) -> Both[str]:
        """The pieces of the reasoning, likewise."""
        return read_by(self, Pieces(Reasoning).taken)

    @overload
    def partials(self: Stream[M], *, grow: bool = True) -> Both[Partial[M]]: ...
    @overload
    def partials(self, *, grow: bool = True) -> Both[Any]: ...
    def partials(self, *, grow: bool = True) -> Both[Any]:
        """What is known of the result, each time that more of it came: a Partial of a model or dataclass, else plain
        objects, lists and values. It is one view that goes on changing; `to_dict()` keeps it as it is. A reader that is
        slower than the answer is not shown each step. After a restart a new one begins.

        grow   texts are shown as they come; false: when they are complete, which own clusters tell by themselves

        Raises UsageError where the call's result is the text.
        """
        assembler = Assembler(self._typed("partials"), lambda: self._run.validation, grows=grow)
        self._run.reads_parts = not grow

        def read(event: StreamEvent[T]) -> Iterator[Any]:
            if isinstance(event, Restarted):
                assembler.begin_again()
            assembler.add(event)
            if not self._has_more:
                yield from assembler.taken()

        return read_by(self, read)

    @overload
    def items(self: Stream[list[U]]) -> Both[U]: ...
    @overload
    def items(self: Stream[tuple[U, ...]]) -> Both[U]: ...
    @overload
    def items(self: Stream[set[U]]) -> Both[U]: ...
    @overload
    def items(self: Stream[frozenset[U]]) -> Both[U]: ...
    @overload
    def items(self: Stream[Sequence[U]]) -> Both[U]: ...
    @overload
    def items(self: Stream[Iterable[U]]) -> Both[U]: ...
    @overload
    def items(self: Stream[Set[U]]) -> Both[U]: ...
    @overload
    def items(self: Stream[N]) -> Both[Any]: ...
    def items(self) -> Both[Any]:
        """Of a result that is a list: each item as it closes, validated, once. Raises InvalidOutput for one that is not
        what its type takes, what a restart is for where the answer then begins with other items than were given, and
        UsageError where the result is no list.
        """
        items: Items[Any] = Items(self._typed("items"), self.name, lambda: self._run.validation)

        def read(event: StreamEvent[T]) -> Iterator[Any]:
            if isinstance(event, Restarted):
                items.begin_again(event.error)
            return items.taken(event)

        return read_by(self, read)

    def _typed(self, verb: str) -> Output[T]:
        if self.output is None:
            raise UsageError(
                f"{self.name}: {verb}() is of calls with a result's type: write output=..., or read text()"
            )
        return self.output

    @verb
    def reply(self, /) -> Machine[Reply[T]]:
        """The whole of it; what is left is read to the end. Raises the stream's CallFailed, also again; UsageError
        where the stream was left before its end.
        """
        if (found := self._finished()) is not None:
            return found
        flow = self._begun() if self._flow is None else self._flow
        try:
            step = self._on(flow, None)
            while True:
                if isinstance(step, Emit):
                    step = self._on(flow, None)
                    continue
                try:
                    result = yield step
                except Exception as exc:
                    step = self._on(flow, exc, is_error=True)
                else:
                    step = self._on(flow, result)
        except _Over:
            pass
        finally:
            self._abandon()
        reply = self._finished()
        if reply is None:
            raise UsageError(f"{self.name}: this stream was left before its end, so that there is no reply")
        return reply

    def _finished(self) -> Reply[T] | None:
        if self._error is not None:
            raise self._error
        return self._reply

    def close(self) -> None:
        """Ends it: the connection closes. Does nothing where the stream is over."""
        source = self._left()
        if source is None:
            return
        if source.loop is background.loop and not background.is_here:
            background.run(source.close())
        else:  # of another loop, or in the midst of it, as where garbage is collected
            source.abandon()

    async def aclose(self) -> None:
        """The same on the loop that reads the stream."""
        if (source := self._left()) is not None:
            await source.close()

    def _abandon(self) -> None:
        if (source := self._left()) is not None:
            source.abandon()

    def _left(self) -> Source | None:
        self._run.is_left = True
        if self._flow is not None:
            with contextlib.suppress(ValueError):  # it runs just now, in a validator: that ends when the source does
                self._flow.close()
        source, self._run.source = self._run.source, None
        return source

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
