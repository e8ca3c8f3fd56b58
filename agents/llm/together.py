"""Several machines at once: what they wait for is waited for side by side; what lies between, one after another, in the
caller's thread.

Agents make the calls of one answer so, and forks their requests. It does not know what the machines do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .machine import Machine, Step, take

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """Machine `index` is over: its result, or what it raised."""

    index: int
    result: T | None = None
    error: Exception | None = None


class Aside:
    """What a machine tells on its way; it is passed on, and nothing is waited for."""

    __slots__ = ()


@dataclass(slots=True)
class Running:
    """What is waited for now, by the machine that waits, and how to end what its steps have begun. All of it lives on
    one loop.
    """

    tasks: dict[asyncio.Task[Any], int] = field(default_factory=dict)
    ends: list[tuple[asyncio.AbstractEventLoop, Callable[[], Awaitable[None]]]] = field(default_factory=list)

    def begin(self, index: int, step: Step[Any], context: Context) -> None:
        """In the loop."""
        self.tasks[asyncio.get_running_loop().create_task(_performed(step), context=context)] = index

    async def finished(self) -> list[tuple[int, Any, Exception | None]]:
        """Those that are ready, at least one."""
        try:
            ready, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.close()
            raise
        found: list[tuple[int, Any, Exception | None]] = []
        for task in sorted(ready, key=self.tasks.__getitem__):
            index = self.tasks.pop(task)
            if task.cancelled():
                found.append((index, None, _Cancelled("what was waited for was cancelled")))
                continue
            error = task.exception()
            if error is not None and not isinstance(error, Exception):
                await self.close()
                raise error
            found.append((index, None if error is not None else task.result(), error))
        return found

    async def close(self) -> None:
        """Cancels what is left, and waits until it is over."""
        tasks = list(self.tasks)
        self.tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for loop, end in self.ends:
            if loop is asyncio.get_running_loop():  # else a tool's own call in a thread, which ends with its thread
                await end()


_owner: ContextVar[Running | None] = ContextVar("_owner", default=None)


def ended_by(end: Callable[[], Awaitable[None]]) -> None:
    """Called in a step that begins what goes on after it: who closes the machines waits for `end`. A machine that is
    left between two steps cannot wait itself.
    """
    if (owner := _owner.get()) is not None:
        owner.ends.append((asyncio.get_running_loop(), end))


class _Cancelled(RuntimeError):
    """A step was cancelled by something else than its reader."""


async def _performed(step: Step[Any]) -> Any:
    return await step.perform()


@dataclass(slots=True)
class _Wait:
    running: Running
    begun: list[tuple[int, Step[Any], Context]]

    async def perform(self) -> list[tuple[int, Any, Exception | None]]:
        for index, step, context in self.begun:
            self.running.begin(index, step, context)
        return await self.running.finished()


@dataclass(slots=True)
class _Close:
    running: Running

    async def perform(self) -> None:
        await self.running.close()


def each(
    machines: Sequence[Generator[Step[Any] | Aside, Any, T]],
    running: Running | None = None,
    *,
    most: int | None = None,
    context: Context | None = None,
) -> Generator[Step[Any] | Aside | Done[T], Any, None]:
    """Tells each machine's end as it comes, as a Done among the steps. At most `most` go on at a time, each in its own
    copy of `context`. Who leaves it elsewhere than at a step closes `running`.
    """
    running = running or Running()
    contexts = [(context.copy() if context is not None else copy_context()) for _ in machines]
    for one in contexts:
        one.run(_owner.set, running)
    waiting = list(range(len(machines)))[::-1]
    begun: list[tuple[int, Step[Any], Context]] = []
    open_ = 0
    try:
        while waiting or open_:
            ready: list[tuple[int, Any, Exception | None]] = []
            if waiting and (most is None or open_ < most):
                ready.append((waiting.pop(), None, None))
                open_ += 1
            else:
                now, begun = begun, []
                ready = yield from take(_Wait(running, now))
            for index, result, error in ready:
                moved = _moved(index, machines[index], contexts[index], result, error)
                while isinstance(moved, Aside):
                    yield moved
                    moved = _moved(index, machines[index], contexts[index], None, None)
                if isinstance(moved, Done):
                    open_ -= 1
                    yield moved
                else:
                    begun.append((index, moved, contexts[index]))
    except GeneratorExit:
        raise
    except BaseException:
        yield _Close(running)
        raise
    finally:
        for machine in machines:
            machine.close()


def _moved(
    index: int,
    machine: Generator[Step[Any] | Aside, Any, T],
    context: Context,
    result: Any,
    error: Exception | None,
) -> Step[Any] | Aside | Done[T]:
    """To the machine's next step, or its end."""
    try:
        return context.run(machine.throw, error) if error is not None else context.run(machine.send, result)
    except StopIteration as end:
        return Done(index, end.value)
    except Exception as exc:
        return Done(index, error=exc)


def together(machines: Sequence[Machine[T]], most: int | None = None) -> Machine[list[T]]:
    """All results, in the order of the machines. The first error ends the others and is raised."""
    running = Running()
    found: list[Any] = [None] * len(machines)
    flow = each(machines, running, most=most)
    try:
        step = next(flow)
        while True:
            if isinstance(step, Done):
                if step.error is not None:
                    yield _Close(running)
                    raise step.error
                found[step.index] = step.result
                step = flow.send(None)
                continue
            assert not isinstance(step, Aside)
            try:
                result = yield step
            except Exception as exc:
                step = flow.throw(exc)
            else:
                step = flow.send(result)
    except StopIteration:
        return found
    finally:
        flow.close()
