"""The calls of one answer, run: at once, each within its time, every mishap an outcome that the model can be told.

reply.py's run_tools is this machine. Arguments are read, approvals asked and results written between its steps, in the
caller's thread; tools run beside it, async ones as tasks of the loop, others in threads of their own.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from pydantic import ValidationError

from diptych.protos.messages import Text, ToolCall

from .draft import Draft
from .errors import ToolFailed, UsageError
from .hooks import ToolRan, told
from .machine import Awaited, Machine, take
from .outcomes import MOST_CHARS, OUTCOMES, Failed, NeedsApproval, Ok, Retry, ToolOutcome, cut, settled, sound, words_of
from .reply import Reply
from .reports import report_of
from .together import ended_by
from .tool_context import Context
from .tools import Tool
from .tracing import tool_span
from .travel import LEFT

logger = logging.getLogger(__name__)
TIMEOUT_S = 600.0
_AT_ONCE = 16
_GRACE_S = 1.0  # for an async tool that is cancelled, to end


class RunLimits(TypedDict, total=False):
    """Of run_tools: seconds for tools without their own, how many run at once, characters of one result."""

    timeout: float
    at_once: int
    most_chars: int


@dataclass(slots=True)
class _Job:
    """A call that is to run. `note` is told to the model in front of the result."""

    at: int
    call: ToolCall
    tool: Tool
    values: dict[str, Any]
    context: Context[Any]
    draft: Draft[Any]
    timeout_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Raw:
    """What came of a job: what its tool returned, or what it raised."""

    job: _Job
    value: Any
    error: BaseException | None
    seconds: float


class _Running:
    """The tasks of some jobs. Their owner takes them as they end, or cancels all."""

    def __init__(self, jobs: Sequence[_Job], at_once: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(at_once)
        self._ended: asyncio.Queue[_Raw] = asyncio.Queue()
        self.left = len(jobs)
        rows = [[job] for job in jobs if job.tool.parallel]
        rows += [row] if (row := [job for job in jobs if not job.tool.parallel]) else []
        self._tasks = [self._loop.create_task(self._row(row)) for row in rows]
        ended_by(self.cancel)

    async def _row(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            async with self._room:
                self._ended.put_nowait(await _performed(job))

    async def some(self) -> list[_Raw]:
        """Those that have ended since, at least one. Cancelled, it cancels all."""
        try:
            found = [await self._ended.get()]
        except asyncio.CancelledError:
            await self.cancel()
            raise
        while not self._ended.empty():
            found.append(self._ended.get_nowait())
        self.left -= len(found)
        return found

    async def cancel(self) -> None:
        """All of them, waiting for their ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def abandon(self) -> None:
        """All that are left, from whatever thread, without waiting."""
        if self.left and not self._loop.is_closed():
            for task in self._tasks:
                self._loop.call_soon_threadsafe(task.cancel)


@dataclass(slots=True)
class _Begin:
    """A step: jobs begin."""

    jobs: Sequence[_Job]
    at_once: int

    async def perform(self) -> _Running:
        """Start them."""
        return _Running(self.jobs, self.at_once)


@dataclass(slots=True)
class _Some:
    """A step: some of them end."""

    running: _Running

    async def perform(self) -> list[_Raw]:
        """Wait for them."""
        return await self.running.some()


@dataclass(slots=True)
class _Run:
    """What holds for all calls of one run."""

    reply: Reply[Any]
    approved: Mapping[str, Any]
    deps: Any
    timeout_s: float
    most_chars: int
    found: dict[int, ToolOutcome] = field(default_factory=dict)


def run_calls(
    reply: Reply[Any],
    approved: Mapping[str, Any],
    done: Sequence[ToolOutcome],
    *,
    deps: Any = None,
    on_error: Literal["tell", "raise"] = "tell",
    on_outcome: Callable[[ToolOutcome], object] | None = None,
    limits: RunLimits | None = None,
) -> Machine[list[ToolOutcome]]:
    """See Reply.run_tools."""
    _check_kinds(approved, done, on_outcome)
    run, at_once = _checked(reply, approved, deps, on_error, limits or {})
    jobs: list[_Job] = []
    kept = list(done)
    for at, call in enumerate(reply.tool_calls):
        before = next((one for one in kept if one.call.id == call.id), None)
        if before is not None:
            kept.remove(before)
        if before is not None and (before.is_settled or call.id not in approved):
            run.found[at] = before
            continue
        planned = yield from _planned(run, at, call)
        if isinstance(planned, _Job):
            jobs.append(planned)
        else:
            yield from _note(run, at, planned, on_outcome)
    raised: _Raw | None = None
    if jobs:
        running = yield from take(_Begin(jobs, at_once))
        try:
            while running.left:
                for raw in (yield from take(_Some(running))):
                    if raw.error is not None and not isinstance(raw.error, Retry | Failed | _TookTooLong):
                        raised = raised or raw
                    yield from _note(run, raw.job.at, _outcome(run, raw), on_outcome)
        finally:
            running.abandon()
    if raised is not None and on_error == "raise":
        name, error = raised.job.tool.name, raised.error
        raise ToolFailed(f"the tool {name} raised {type(error).__name__}: {words_of(error)}", name) from error
    return [run.found[at] for at in sorted(run.found)]


def _check_kinds(approved: object, done: object, on_outcome: object) -> None:
    if not isinstance(approved, Mapping):
        raise UsageError(f"run_tools: approved is a dict by the calls' ids, not {approved!r}", "approved")
    if not isinstance(done, list | tuple) or not all(isinstance(one, ToolOutcome) for one in done):
        raise UsageError(f"run_tools: done is a list of outcomes, as run_tools gave them, not {done!r}", "done")
    if on_outcome is not None and not callable(on_outcome):
        raise UsageError(f"run_tools: on_outcome is a function of an outcome, not {on_outcome!r}", "on_outcome")


def _checked(
    reply: Reply[Any], approved: Mapping[str, Any], deps: Any, on_error: str, limits: RunLimits
) -> tuple[_Run, int]:
    if on_error not in ("tell", "raise"):
        raise UsageError(f"run_tools: on_error is tell or raise, not {on_error!r}", "on_error")
    for name in limits:
        if name not in RunLimits.__annotations__:
            raise UsageError(f"run_tools: there is no argument {name!r}", name)
    values: dict[str, Any] = {"timeout": TIMEOUT_S, "at_once": _AT_ONCE, "most_chars": MOST_CHARS, **limits}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(f"run_tools: {name} is a number above 0, not {value!r}", name)
        if name != "timeout" and not isinstance(value, int):
            raise UsageError(f"run_tools: {name} is a whole number from 1 up, not {value!r}", name)
    ids = [call.id for call in reply.tool_calls]
    for call_id, said in approved.items():
        if call_id not in ids:
            there = ", ".join(f"{call.id} ({call.name})" for call in reply.tool_calls) or "none"
            raise UsageError(f"run_tools: approved names {call_id!r}; the model's calls are: {there}", "approved")
        is_args = isinstance(said, Mapping) and said.keys() == {"args"} and isinstance(said["args"], Mapping)
        if not isinstance(said, bool) and not isinstance(said, OUTCOMES) and not is_args:
            raise UsageError(
                f"run_tools: approved[{call_id!r}] is True, False, {{'args': {{...}}}} or an outcome, not {said!r}",
                "approved",
            )
    given = reply.draft.deps if deps is None else deps
    if given is LEFT:
        raise UsageError(
            f"{reply.draft.name}: its deps did not travel with this reply: run_tools(deps=...) gives them anew", "deps"
        )
    run = _Run(reply, approved, given, float(values["timeout"]), int(values["most_chars"]))
    return run, int(values["at_once"])


def _note(
    run: _Run, at: int, outcome: ToolOutcome, on_outcome: Callable[[ToolOutcome], object] | None
) -> Machine[None]:
    run.found[at] = outcome
    draft = run.reply.draft
    if not isinstance(outcome.outcome, NeedsApproval):  # that one has yet to run
        told(draft, ToolRan(draft=draft, call=outcome.call, outcome=outcome.outcome, seconds=outcome.seconds))
    if on_outcome is not None:
        said = on_outcome(outcome)
        if inspect.isawaitable(said):
            yield from take(Awaited(said))


def _planned(run: _Run, at: int, call: ToolCall) -> Machine[_Job | ToolOutcome]:
    """A job, or the outcome of a call that does not run."""
    tools = {tool.name: tool for tool in run.reply.draft.tools}
    said = run.approved.get(call.id)
    if said is False:
        return settled(call, Failed("this call was not approved, and did not run"))
    if said is not None and not isinstance(said, bool | Mapping):
        return settled(call, said, most_chars=run.most_chars)
    tool = tools.get(call.name)
    if tool is None:
        names = ", ".join(tools) or "none at all"
        return settled(call, Retry(f"There is no tool {call.name!r}; the tools are: {names}."))
    if tool.body is LEFT:
        raise UsageError(
            f"the tool {call.name} did not travel with this reply, because it has no name in a module: run it yourself "
            f"and go on with reply.resume([llm.result({call.id!r}, value)]), or define it at the top of a module"
        )
    document, note = _document(call), ""
    if isinstance(said, Mapping):
        try:
            document = json.dumps(said["args"], ensure_ascii=False, default=_jsonable)
        except (TypeError, ValueError) as exc:
            raise UsageError(f"run_tools: approved[{call.id!r}]['args'] has no JSON: {exc}", "approved") from exc
        note = f"[Before it ran, a person changed the arguments to {cut(document, run.most_chars)}]\n"
    try:
        values = tool.body.read(document)
    except Exception as exc:  # whatever the developer's own validators raise
        if note:
            raise UsageError(
                f"run_tools: the tool {call.name} does not take approved[{call.id!r}]:\n{_reproach(exc, document)}",
                "approved",
            ) from exc
        return _given_up(run, tool, settled(call, Retry(_reproach(exc, document))))
    if said is None:
        needs, reason = yield from needs_approval(tool, values)
        if needs:
            return ToolOutcome(call, NeedsApproval(reason, tool.body.with_defaults(values)))
    context = Context(
        deps=run.deps,
        reply=run.reply,
        call=call,
        session=run.reply.draft.params.get("session") or "",
        is_approved=said is not None,
    )
    timeout_s = run.timeout_s if tool.timeout is None else tool.timeout
    return _Job(at, call, tool, values, context, run.reply.draft, timeout_s, note)


def _document(call: ToolCall) -> str:
    return sound(call.text) if call.text.strip() else json.dumps(call.arguments)


def _jsonable(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)


def _reproach(error: Exception, document: str) -> str:
    if not isinstance(error, ValidationError | ValueError):
        return f"The arguments could not be read: {type(error).__name__}: {cut(words_of(error), 500)}"
    lines = []
    for one in report_of(error, document, document).errors[:20]:
        hint = f" ({one.hint})" if one.hint and one.kind != "json_invalid" else ""
        lines.append(f"- {one.path or 'the arguments'}: {one.message}; found {one.found}{hint}")
    return "The arguments are not what this tool takes:\n" + "\n".join(lines)


def needs_approval(tool: Tool, values: dict[str, Any]) -> Machine[tuple[bool, str]]:
    """Whether a person must agree to a call, and why."""
    asked = tool.needs_approval
    if isinstance(asked, bool):
        return asked, ""
    try:
        found = asked(tool.body.with_defaults(values))
        if inspect.isawaitable(found):
            found = yield from take(Awaited(found))
    except Exception as exc:  # a check that breaks must not let a call pass
        logger.warning("needs_approval of the tool %s raised: a person is asked", tool.name, exc_info=exc)
        return True, f"the check of this call raised {type(exc).__name__}: {cut(words_of(exc), 200)}"
    return bool(found), ""


def _outcome(run: _Run, raw: _Raw) -> ToolOutcome:
    job, error = raw.job, raw.error
    found: Any = raw.value
    if isinstance(error, Retry | Failed):
        found = error.with_traceback(None)
    elif isinstance(error, _TookTooLong):
        found = Failed(str(error))
    elif error is not None:
        logger.warning("the tool %s raised; the model is told of it", job.tool.name, exc_info=error)
        words = cut(words_of(error), 1_000)
        found = Failed(f"{type(error).__name__}: {words}" if words else type(error).__name__)
    if isinstance(found, NeedsApproval):
        args = job.tool.body.with_defaults(job.values) if found.args is None else found.args
        found = NeedsApproval(found.reason, args)
    outcome = settled(job.call, found, seconds=raw.seconds, most_chars=run.most_chars)
    if job.note and outcome.parts:
        first, *more = outcome.parts
        noted = [Text(job.note + first.text)] if isinstance(first, Text) else [Text(job.note), first]
        outcome = ToolOutcome(outcome.call, outcome.outcome, outcome.seconds, (*noted, *more))
    return _given_up(run, job.tool, outcome)


def _given_up(run: _Run, tool: Tool, outcome: ToolOutcome) -> ToolOutcome:
    """`outcome`, or the end of a tool that failed too often in a row."""
    if tool.retries is None or not outcome.is_error:
        return outcome
    failures = 0
    for message in reversed(run.reply.draft.messages):
        if message.role == "user":
            break
        if message.result is not None and message.result.name == outcome.call.name:
            if not message.result.is_error:
                break
            failures += 1
    if failures < tool.retries:
        return outcome
    assert isinstance(outcome.outcome, Retry | Failed)
    words = f"{outcome.outcome.message}\nThis failed {failures + 1} times in a row: do not call {tool.name} again."
    return settled(outcome.call, Failed(words), seconds=outcome.seconds, most_chars=run.most_chars)


class _TookTooLong(Exception):
    """A tool did not end within its time."""


async def _performed(job: _Job) -> _Raw:
    began = time.monotonic()
    work = asyncio.get_running_loop().create_task(_worked(job))
    limit_s = None if math.isinf(job.timeout_s) else job.timeout_s
    try:
        await asyncio.wait({work}, timeout=limit_s)
        if work.done():
            value, error = await work
            return _Raw(job, value, error, time.monotonic() - began)
        await _stopped(job, work)
        late = _TookTooLong(f"{job.tool.name} took longer than {job.timeout_s:g} s")
        return _Raw(job, None, late, time.monotonic() - began)
    except asyncio.CancelledError:
        await _stopped(job, work)
        raise


async def _stopped(job: _Job, work: asyncio.Task[Any]) -> None:
    work.cancel()
    await asyncio.wait({work}, timeout=_GRACE_S)
    if not work.done() or not job.tool.body.is_async:
        what = "task" if job.tool.body.is_async else "thread"
        logger.warning("the tool %s runs on after its time, or its caller; its %s is left behind", job.tool.name, what)


async def _worked(job: _Job) -> tuple[Any, BaseException | None]:
    """What the tool returned, or what it raised."""
    try:
        if job.tool.body.is_async:
            with tool_span(job.draft, job.call, job.tool.description) as span:
                value = await job.tool.body.start(job.values, job.context)
                _tell(span, value)
            return value, None
        value, error = await _in_thread(job)
        if error is None and inspect.isawaitable(value):  # a plain function that gives a coroutine
            value = await value
        return value, error
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return None, RuntimeError(f"cancelled within the tool: {exc}")
    except KeyboardInterrupt as exc:
        if threading.current_thread() is threading.main_thread():
            raise  # somebody's Ctrl-C; elsewhere it is the tool's own
        return None, exc
    except BaseException as exc:  # whatever it is: nobody would hear of a task that ends with it
        return None, exc


def _tell(span: Any, value: Any) -> None:
    if span is not None and not isinstance(value, Ok) and isinstance(value, OUTCOMES):
        span.end(type(value).__name__.lower())


def _in_thread(job: _Job) -> Coroutine[Any, Any, tuple[Any, BaseException | None]]:
    """In a thread of its own, which nobody waits for: one that hangs must not hold up the end of the program."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def deliver(found: tuple[Any, BaseException | None]) -> None:
        if not future.done():
            future.set_result(found)

    def started() -> Any:
        with tool_span(job.draft, job.call, job.tool.description) as span:
            value = job.tool.body.start(job.values, job.context)
            _tell(span, value)
            return value

    def work() -> None:
        try:
            found: tuple[Any, BaseException | None] = (context.run(started), None)
        except BaseException as exc:
            found = (None, exc)
        try:
            loop.call_soon_threadsafe(deliver, found)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.warning("the tool %s ended after its caller", job.tool.name)

    async def waited() -> tuple[Any, BaseException | None]:
        return await future

    threading.Thread(target=work, name=f"tool {job.tool.name}", daemon=True).start()
    return waited()
