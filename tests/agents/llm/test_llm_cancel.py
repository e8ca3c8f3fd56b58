"""Who leaves closes the connection: by break, by an exception, by a closed iterator, by a cancelled task, by Ctrl-C.

Guards against: streams that a server goes on to write for nobody, tasks and connections left behind, a background loop
that still works for a caller who is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

from diptych.agents import llm
from diptych.agents.llm import background as background_module
from diptych.agents.llm.background import Background, background
from diptych.agents.llm.call import Call
from diptych.agents.llm.testing import Said, ScriptedModel, failure, registry_of
from diptych.protos.deltas import Content

LONG = "word " * 2_000


def asking(entries: list[Any], **more: Any) -> tuple[Call[..., Any, Any], ScriptedModel]:
    model = ScriptedModel(entries, delay_s=0.0005)

    @llm.call("a/m", registry=registry_of(a=model), **more)
    def ask() -> str:
        return "go"

    return ask, model


async def quiet(is_over: Callable[[], bool]) -> None:
    """Waits until it is, on a loop that has nothing else to do."""
    async with asyncio.timeout(10):
        while not is_over():  # noqa: ASYNC110  whatever it is
            await asyncio.sleep(0.001)


def settled(is_over: Callable[[], bool]) -> None:
    background.run(quiet(is_over))


def test_a_break_closes_it() -> None:
    ask, model = asking([LONG])
    for _ in ask.stream():
        assert model.open_streams == 1
        break
    assert model.open_streams == 0


def test_an_exception_closes_it() -> None:
    ask, model = asking([LONG])

    def read() -> None:
        with ask.stream() as stream:
            for _ in stream.text():
                raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        read()
    settled(lambda: model.open_streams == 0)


def test_an_iterator_that_nobody_holds_closes_it() -> None:
    ask, model = asking([LONG])
    texts = iter(ask.stream().text())
    next(texts)
    assert model.open_streams == 1
    del texts
    gc.collect()
    settled(lambda: model.open_streams == 0)


def test_another_thread_closes_it() -> None:
    """Its reader ends as at the end of an answer; there is no reply."""
    ask, model = asking([Said(text="x", delay_s=60)])
    stream = ask.stream()
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    settled(lambda: model.open_streams == 1)
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    assert (found, model.open_streams) == ([], 0)
    with pytest.raises(llm.UsageError, match="left before its end"):
        stream.reply()


async def test_one_that_was_closed_while_it_was_being_opened_is_not_read() -> None:
    """The connection came when nobody looked for it any more, and stayed."""
    ask, model = asking([Said(text="x", delay_s=60)])
    stream = ask.stream()
    stream._run.is_left = True  # as a close() in another thread leaves it
    with contextlib.suppress(llm.Error):
        await asyncio.wait_for(anext(aiter(stream), None), 30)
    assert model.open_streams == 0


def test_a_stream_in_the_loop_of_synchronous_calls_is_closed_without_waiting() -> None:
    """Garbage is collected in whatever thread; there the close waited for itself."""
    ask, model = asking([LONG])
    stream = ask.stream()
    events = iter(stream)
    next(events)

    async def close() -> None:
        stream.close()

    background.run(close())
    settled(lambda: model.open_streams == 0)


async def test_a_break_closes_it_async() -> None:
    ask, model = asking([LONG])
    async for _ in ask.stream():
        assert model.open_streams == 1
        break
    await quiet(lambda: model.open_streams == 0)


async def test_a_with_block_has_closed_it() -> None:
    ask, model = asking([LONG])
    async with ask.stream() as stream:
        async for _ in stream.text():
            break
    assert model.open_streams == 0


@pytest.mark.parametrize("way", ["events", "text", "reply", "call"])
async def test_a_cancelled_task_closes_it(way: str) -> None:
    """In the midst of a wait."""
    ask, model = asking([Said(text="x", delay_s=60)])
    began = asyncio.Event()

    async def read() -> None:
        began.set()
        stream = ask.stream()
        if way == "events":
            async for _ in stream:
                pass
        elif way == "text":
            async for _ in stream.text():
                pass
        elif way == "reply":
            await stream.reply.aio()
        else:
            await ask.aio()

    task = asyncio.create_task(read())
    await began.wait()
    await quiet(lambda: len(model.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await quiet(lambda: model.open_streams == 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_cancelled_pause_asks_no_more() -> None:
    ask, model = asking([failure("rate_limited", retry_after_s=60), "x"])
    task = asyncio.create_task(ask.aio())
    await quiet(lambda: len(model.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(model.requests) == 1


async def test_an_exception_in_the_reader_is_the_readers() -> None:
    ask, model = asking([LONG])

    async def read() -> None:
        async for event in ask.stream():
            if isinstance(event, Content):
                raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        await read()
    await quiet(lambda: model.open_streams == 0)


def test_a_loop_that_ends_leaves_nothing() -> None:
    """asyncio.run closes what its coroutine left."""
    ask, model = asking([LONG])
    kept: list[Any] = []

    async def leave() -> None:
        events = aiter(ask.stream())
        kept.append(events)
        await anext(events)

    asyncio.run(leave())
    assert model.open_streams == 0


def test_what_interrupts_a_wait_ends_the_work() -> None:
    """And is raised when the work has ended, not before."""
    script = """
        import asyncio, os, signal, sys, threading
        from diptych.agents.llm.background import background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs this in the background has it ignored
        seen = []
        async def work():
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.05)
                seen.append("closed")
                raise
        try:
            background.run(work())
        except KeyboardInterrupt:
            print(seen)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "['closed']", "")


def test_work_that_was_interrupted_before_it_began_is_not_left() -> None:
    loops = Background()
    ran: list[str] = []

    async def work() -> None:
        ran.append("x")

    class Interrupted(BaseException):
        """As KeyboardInterrupt."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    loops.run(work())
    blocked, free = threading.Event(), threading.Event()
    assert loops.loop is not None

    def block() -> None:
        blocked.set()
        free.wait(10)

    loops.loop.call_soon_threadsafe(block)
    blocked.wait(10)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        threading.Timer(0.1, free.set).start()
        with pytest.raises(Interrupted):
            loops.run(work())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ran == ["x"]
    loops.loop.call_soon_threadsafe(loops.loop.stop)
    assert loops._thread is not None
    loops._thread.join(10)
    loops.loop.close()


def test_an_interrupt_behind_the_end_of_the_work_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's handler may run when the wait is over and its caller has not gone on: a second wait has no end."""
    loops = Background()
    num_waits = 0

    class Interrupted(BaseException):
        """As KeyboardInterrupt."""

    class Latch:
        """Raises when it was taken."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self._lock.acquire()

        def acquire(self) -> bool:
            nonlocal num_waits
            num_waits += 1
            assert num_waits == 1, "waits for what has been"
            assert self._lock.acquire(timeout=10)
            raise Interrupted

        def release(self) -> None:
            self._lock.release()

    class Errand(background_module._Errand[str]):
        """With that latch."""

        __slots__ = ()

        def __init__(self, work: Any, loop: asyncio.AbstractEventLoop) -> None:
            super().__init__(work, loop)
            self.latch: Any = Latch()

    async def work() -> str:
        return "x"

    assert loops.run(work()) == "x"
    monkeypatch.setattr(background_module, "_Errand", Errand)
    with pytest.raises(Interrupted):
        loops.run(work())
    monkeypatch.undo()
    assert loops.run(work()) == "x"
    assert loops.loop is not None
    assert loops._thread is not None
    loops.loop.call_soon_threadsafe(loops.loop.stop)
    loops._thread.join(10)
    loops.loop.close()


def test_what_the_work_raised_keeps_nothing_alive() -> None:
    """The error's traceback holds the frames of the wait: one that held the error would leave it to the collector."""

    class Broken(Exception):
        """Of the work."""

    async def work() -> None:
        raise Broken

    gc.collect()
    gc.disable()
    try:
        kept: list[weakref.ref[Broken]] = []
        try:
            background.run(work())
        except Broken as exc:
            kept.append(weakref.ref(exc))
        background.run(asyncio.sleep(0))
        assert kept[0]() is None
    finally:
        gc.enable()


def test_work_of_many_threads_is_all_done_each_in_its_callers_context() -> None:
    """A wake-up that is lost would leave one of them waiting for ever."""
    loops = Background()
    asked: ContextVar[int] = ContextVar("asked", default=-1)
    seen: dict[int, list[tuple[int, int]]] = {number: [] for number in range(8)}

    async def work(at: int) -> tuple[int, int]:
        if at % 3 == 0:
            await asyncio.sleep(0)
        return asked.get(), at

    def several(number: int) -> None:
        asked.set(number)
        seen[number] += [loops.run(work(at)) for at in range(300)]

    threads = [threading.Thread(target=several, args=(number,), daemon=True) for number in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {number: [(number, at) for at in range(300)] for number in seen}
    assert loops.loop is not None
    assert loops._thread is not None
    loops.loop.call_soon_threadsafe(loops.loop.stop)
    loops._thread.join(10)
    loops.loop.close()
