"""`diptych run FILE:FUNCTION`: a call, an agent, a prompt or a plain function of a file, from a command line.

cluster/cli.py calls `run`. The result goes to stdout, everything else to stderr; arguments are
command_arguments.py's.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic_core import to_jsonable_python

from diptych.protos.deltas import Content

from .agent import Agent
from .agent_events import HandedOff, Run, TextDelta, ToolBegan, ToolEnded, TurnBegan
from .agent_streams import AgentStream
from .attempts import Attempt
from .call import Call
from .command_arguments import Parameter, WrongArguments, arguments, bound, parameters_of, rest_of, words_of
from .command_files import FromFile, from_file
from .command_frame import ended, json_of, noted
from .errors import UsageError
from .partial import plain
from .prompt import Prompt
from .registry import using
from .reply import Reply, Unset
from .streams import Restarted, Stream
from .tool_context import Injection
from .usage import Spent

T = TypeVar("T")


def run(
    target: str,
    rest: Sequence[str] = (),
    *,
    named: Sequence[str] = (),
    model: str | None = None,
    stream: bool = False,
    as_json: bool = False,
) -> int:
    """Runs it, and gives the exit code: 0; 1 with a sentence on stderr where it failed; 2 where the command line cannot
    be meant; 130 after Ctrl-C. `rest` are the words that belong to the function, `named` NAME=VALUE of --arg.
    """

    def body() -> int:
        if target.startswith("-"):
            raise WrongArguments(f"{target}: FILE:FUNCTION comes first, the function's arguments behind it")
        given = words_of(named, rest)
        if stream and as_json:
            raise WrongArguments("--stream shows the answer as it comes, --json all of it at the end: leave one out")
        with from_file(target, OWN) as found, using(model=model):
            _Asked(found, model, _Shown(found.name, stream, as_json)).run(given)
        return 0

    return ended(body, target)


OWN = (Call, Agent, Prompt)


@dataclass(slots=True)
class _Asked:
    """What is run, with its arguments."""

    found: FromFile
    model: str | None
    shown: _Shown

    def run(self, given: Sequence[tuple[str, str | None]]) -> None:
        target, name = self.found.value, self.found.name
        if isinstance(target, Prompt):
            target = call_of(target, name, self.model)
        try:
            if isinstance(target, Call):
                self._call(target, given)
            elif isinstance(target, Agent):
                self._agent(target, given)
            else:
                self._function(target, given)
        finally:
            self.shown.end()  # before anything is said of an answer that broke off

    def _call(self, call: Call[..., Any, Any], given: Sequence[tuple[str, str | None]]) -> None:
        injection = Injection.of(call.function, self.found.name)
        args, kwargs = self._filled(call.function, given, None if injection is None else injection.name)
        if self.shown.is_streamed:
            self.shown.stream(call.stream(*args, **kwargs), is_async=call.is_async)
        else:
            self.shown.result(asyncio.run(call.aio(*args, **kwargs)) if call.is_async else call(*args, **kwargs))

    def _agent(self, agent: Agent[Any, Any], given: Sequence[tuple[str, str | None]]) -> None:
        takes = {"prompt": Parameter("prompt", True, lambda: str)}
        if agent.deps_type is not None:
            takes["deps"] = Parameter("deps", True, lambda: agent.deps_type)
        values = arguments(self.found.name, takes, given)
        if self.shown.is_streamed:
            self.shown.agent_stream(agent.stream(**values), is_text=agent.output_type is None)
        else:
            self.shown.result(agent.run(**values))

    def _function(self, function: Callable[..., Any], given: Sequence[tuple[str, str | None]]) -> None:
        args, kwargs = self._filled(function, given, None)
        self.shown.result(_waited(function(*args, **kwargs)))

    def _filled(
        self, function: Callable[..., Any], given: Sequence[tuple[str, str | None]], without: str | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        others = rest_of(function)
        takes = parameters_of(function, without)
        values = arguments(self.found.name, takes, given, others=others)
        found = bound(function, values, without)
        return found.args, found.kwargs


def call_of(prompt: Prompt[..., Any], name: str, model: str | None) -> Call[..., Any, str]:
    """A prompt asked of `model`. Raises WrongArguments where there is none."""
    if model is None:
        raise WrongArguments(f"{name} is a prompt without a model: add --model PREFIX/MODEL")
    return prompt.call(model)


def _waited(found: Any) -> Any:
    """Of a coroutine, what it gives."""
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


async def _awaited(found: Awaitable[T]) -> T:
    return await found


@dataclass(slots=True)
class _Shown:
    """How results are told."""

    name: str
    is_streamed: bool
    is_json: bool
    _is_open: bool = False  # a line that has no end yet

    def result(self, found: Any) -> None:
        """Raises UsageError where there is no value, or none that can be written."""
        if isinstance(found, Stream):
            self.stream(found, is_async=False) if self.is_streamed else self.result(found.reply())
        elif isinstance(found, AgentStream):
            self.agent_stream(found, is_text=False) if self.is_streamed else self.result(found.run())
        elif isinstance(found, Reply | Run):
            if self.is_json:
                self._line(json_of(_told_of(found), self.name))
                found.value  # noqa: B018  without one, it says what must be done
            else:
                self._value(found.value)
        elif not isinstance(found, str) and (inspect.isgenerator(found) or inspect.isasyncgen(found)):
            self._pieces(found)
        elif self.is_streamed:
            raise WrongArguments(
                f"--stream: {self.name} is a plain function that gives all at once: let it yield its pieces, return "
                f"a stream, or name a call or an agent"
            )
        elif self.is_json:
            self._line(json_of({"value": found}, self.name))
        elif found is not None:  # a function that prints for itself
            self._value(found)

    def stream(self, stream: Stream[Any], *, is_async: bool) -> None:
        """Text as it comes; items of a list as they close, and other values each time that a part of them is complete,
        as a line of JSON each. The value is the last line, where it is no list.
        """
        if stream.output is None:
            _each(stream, self._event, is_async=is_async)
            self.end()
            _value_of(stream, is_async=is_async)
            return
        try:
            items = stream.items()
        except UsageError:
            last: list[bytes] = []

            def told(value: Any) -> None:
                line = json_of(plain(value), self.name)
                if last[-1:] != [line]:
                    last[:] = [line]
                    self._line(line)

            _each(stream.partials(grow=False), told, is_async=is_async)
            told(_value_of(stream, is_async=is_async))
            return
        _each(items, lambda item: self._line(json_of(item, self.name)), is_async=is_async)
        _value_of(stream, is_async=is_async)

    def agent_stream(self, stream: AgentStream[Any], *, is_text: bool) -> None:
        """Its text as it comes, and on stderr what it does; a typed value as JSON at the end."""
        for event in stream:
            if isinstance(event, TextDelta):
                if is_text:
                    self._write(event.text)
                continue
            if isinstance(event, TurnBegan):
                self.end()
            elif isinstance(event, Restarted):
                self._again(event)
            elif isinstance(event, ToolBegan):
                self._note(f"{event.agent} calls {event.call.name} {event.call.arguments}")
            elif isinstance(event, ToolEnded):
                self._note(f"{event.outcome.call.name}: {type(event.outcome.outcome).__name__}")
            elif isinstance(event, HandedOff):
                self._note(f"{event.source} hands over to {event.target}")
        self.end()
        value = stream.run().value
        if not is_text:
            self._value(value)

    def _event(self, event: Any) -> None:
        if isinstance(event, Content):
            self._write(event.text)
        elif isinstance(event, Restarted):
            self._again(event)

    def _again(self, event: Restarted) -> None:
        self.end()
        self._note(f"{self.name} begins anew ({event.why}): {event.error.message}")

    def _pieces(self, found: Any) -> None:
        """What a generator yields. Texts are pieces of one text, other values a line each."""
        if self.is_json:
            values: list[Any] = []
            _each(found, values.append, is_async=inspect.isasyncgen(found))
            self._line(json_of({"value": values}, self.name))
            return

        def told(piece: Any) -> None:
            if isinstance(piece, str):
                self._write(piece)
            else:
                self._line(json_of(piece, self.name))

        _each(found, told, is_async=inspect.isasyncgen(found))
        self.end()

    def _value(self, value: Any) -> None:
        if isinstance(value, str):
            self._write(value)
            self.end()
        else:
            self._line(json_of(value, self.name, indent=2))

    def _line(self, document: bytes) -> None:
        self.end()
        self._write(document.decode() + "\n")

    def _write(self, text: str) -> None:
        if text:
            self._is_open = not text.endswith("\n")  # first: who reads it may interrupt at once
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self) -> None:
        """Of the line that is being written."""
        if self._is_open:
            self._write("\n")

    def _note(self, words: str) -> None:
        self.end()
        noted(words)


def _each(source: Any, told: Callable[[Any], None], *, is_async: bool) -> None:
    """Reads it the way its function was written: what waits in it belongs to one loop."""
    if not is_async:
        for one in cast("Iterable[Any]", source):
            told(one)
        return

    async def read() -> None:
        async for one in cast("AsyncIterable[Any]", source):
            told(one)

    asyncio.run(read())


def _value_of(stream: Stream[Any], *, is_async: bool) -> Any:
    return (asyncio.run(stream.reply.aio()) if is_async else stream.reply()).value


def _told_of(found: Reply[Any] | Run[Any]) -> dict[str, Any]:
    """For programs. Without `value` where there is none."""
    value = {} if isinstance(found.result, Unset) else {"value": found.result}
    if isinstance(found, Run):
        return value | {
            "text": found.text,
            "agent": found.agent,
            "turns": found.state.turns,
            "tool_calls": found.state.tool_calls,
            "pending": found.pending,
            "spent": _spent(found.spent),
        }
    return value | {
        "text": found.text,
        "thoughts": found.thoughts,
        "tool_calls": [{"name": one.name, "arguments": one.arguments} for one in found.tool_calls],
        "model": found.model,
        "finish": found.finish,
        "spent": _spent(found.spent),
        "attempts": [_attempt(one) for one in found.attempts],
    }


def _spent(spent: Spent) -> dict[str, Any]:
    return cast("dict[str, Any]", to_jsonable_python(spent))


def _attempt(one: Attempt) -> dict[str, Any]:
    error = None if one.error is None else {"type": type(one.error).__name__, "message": one.error.message}
    return {"number": one.number, "model": one.model, "why": one.why, "seconds": one.seconds, "error": error}
