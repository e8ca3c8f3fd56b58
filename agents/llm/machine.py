"""Logic that is written once and runs both ways: a generator yields steps that wait, a driver performs them.

call.py, retries and agents are machines. Everything between two steps (validators, hooks, processors, a developer's own
functions) runs in the caller's thread, so that it may make synchronous calls itself.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from .background import background

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")
P = ParamSpec("P")


class Step(Protocol[T_co]):
    """Something to wait for."""

    async def perform(self) -> T_co:
        """Do it."""


Machine = Generator[Step[Any], Any, T]


@dataclass(slots=True)
class Awaited(Generic[T]):
    """A developer's own awaitable."""

    awaitable: Awaitable[T]

    async def perform(self) -> T:
        """Wait for it."""
        return await self.awaitable


@dataclass(slots=True)
class Sleep:
    """A pause."""

    seconds: float

    async def perform(self) -> None:
        """Pass the time."""
        await asyncio.sleep(self.seconds)


def is_async(function: object) -> bool:
    """Whether a call of it gives a coroutine: an async def, an object whose __call__ is one, a partial of either."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def take(step: Step[T]) -> Machine[T]:
    """`result = yield from take(step)`, with the result's type."""
    result: T = yield step
    return result


def drive(machine: Machine[T]) -> T:
    """Runs it to its end in this thread."""
    try:
        step = next(machine)
        while True:
            try:
                found = background.run(step.perform())
            except Exception as exc:
                step = machine.throw(exc)
            else:
                step = machine.send(found)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        machine.close()


async def adrive(machine: Machine[T]) -> T:
    """Runs it to its end on the running loop."""
    try:
        step = next(machine)
        while True:
            try:
                found = await step.perform()
            except Exception as exc:
                step = machine.throw(exc)
            else:
                step = machine.send(found)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        machine.close()


class Verb(Generic[P, T]):
    """What can be done, both ways: `verb(...)` waits, `await verb.aio(...)` lets the loop go on."""

    __slots__ = ("_machine",)

    def __init__(self, machine: Callable[P, Machine[T]]) -> None:
        self._machine = machine

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Wait for it in this thread."""
        return drive(self._machine(*args, **kwargs))

    async def aio(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same as a coroutine."""
        return await adrive(self._machine(*args, **kwargs))

    def machine(self, *args: P.args, **kwargs: P.kwargs) -> Machine[T]:
        """For other machines: `yield from`."""
        return self._machine(*args, **kwargs)


class verb(Generic[S, P, T]):
    """Makes a method that is a machine a Verb."""

    def __init__(self, machine: Callable[Concatenate[S, P], Machine[T]]) -> None:
        self._machine = machine
        self.__doc__ = machine.__doc__

    @overload
    def __get__(self, owner: None, kind: type[S]) -> verb[S, P, T]: ...
    @overload
    def __get__(self, owner: S, kind: type[S] | None = None) -> Verb[P, T]: ...
    def __get__(self, owner: S | None, kind: type[S] | None = None) -> Verb[P, T] | verb[S, P, T]:
        if owner is None:
            return self
        machine = self._machine

        def bound(*args: P.args, **kwargs: P.kwargs) -> Machine[T]:
            return machine(owner, *args, **kwargs)

        return Verb(bound)
