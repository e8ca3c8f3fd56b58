"""`diptych batch VERB`: calls of a function for every line of a file, as a batch; what became of it, from anywhere.

cluster/batch_verbs.py calls it. A job is a reference PREFIX/MODEL@ID, which is all that stdout gets of a new one;
results are lines of JSON there. Everything else goes to stderr.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from diptych.protos.failures import FailureKind

from .agent import Agent
from .batch import BatchJob, batch_begin, batch_list, batch_resume
from .batch_items import items_of
from .batch_places import BatchStatus
from .batch_results import BatchResult, BatchResults
from .call import Call
from .command import OWN, call_of
from .command_arguments import WrongArguments
from .command_files import FromFile, from_file
from .command_frame import FAILED, ended, json_of, noted
from .errors import ProviderError, UsageError
from .prompt import Prompt
from .registry import using
from .reply import Unset

T = TypeVar("T")
_JOB = re.compile(r"[^/@{]+/[^{]*@[^/@]+")


def submit(
    target: str,
    items: str,
    *,
    id_member: str | None = None,
    model: str | None = None,
    window: str = "24h",
    state_file: Path | None = None,
    poll_s: float | None = None,
) -> int:
    """Submits a call of FILE:FUNCTION for each line of `items` (`-`: stdin), and prints the job; with `poll_s` it waits
    and prints the results instead. The exit code, as of `run`.
    """

    def body() -> int:
        with redirect_stdout(sys.stderr), from_file(target, OWN) as found, using(model=model):
            call = _call(found, model)
            job = batch_begin(call, items_of(call, items, id_member), window=window, state_file=state_file)
            if poll_s is not None:
                noted(f"{_of(len(job.ids), 'item')} in {job.reference}")
                _awaited(job, poll_s)
                there = job.results()
        if poll_s is not None:
            return _told(there)
        noted(f"{_of(len(job.ids), 'item')}; `diptych batch wait {job.reference}` waits for them")
        print(job.reference)
        return 0

    return ended(body, target, wrong=UsageError)


def status(job: str, target: str | None = None, *, as_json: bool = False) -> int:
    """Prints how far it is. The exit code."""
    return _on(job, target, lambda found: found.status(), lambda name, told: _shown(name, told, as_json=as_json))


def wait(job: str, target: str | None = None, *, poll_s: float = 10.0) -> int:
    """Until it is over, with progress on stderr. The exit code: 1 where it did not come to its end."""

    def shown(reference: str, told: BatchStatus) -> int:
        _shown(reference, told)
        return 0 if told.state == "completed" else FAILED

    return _on(job, target, lambda found: _awaited(found, poll_s), shown)


def cancel(job: str, target: str | None = None) -> int:
    """Stops it; what is answered stays. The exit code."""
    return _on(job, target, lambda found: found.cancel(), _shown)


def results(job: str, target: str | None = None) -> int:
    """A line of JSON for each item: `id`, and `value` or `error`; texts without a function. The exit code: 1 where one
    failed, or it is not over.
    """

    def there(found: BatchJob[Any]) -> BatchStatus | BatchResults[Any]:
        told = found.status()
        return found.results() if told.is_over else told

    def shown(reference: str, told: BatchStatus | BatchResults[Any]) -> int:
        if isinstance(told, BatchResults):
            return _told(told)
        noted(f"{_line(told)}: `diptych batch wait {reference}` waits for it")
        return FAILED

    return _on(job, target, there, shown)


def listed(prefix: str, target: str | None = None, *, limit: int = 20, as_json: bool = False) -> int:
    """The batches of a place, the newest first. The exit code."""

    def body() -> int:
        with _file(target) as found:
            registry = None if found is None else _call(found, f"{prefix}/-").blank().registry
            there = batch_list(prefix, limit=limit, registry=registry)
        for reference, one in there.items():
            _shown(reference, one, as_json=as_json)
        return 0

    return ended(body, target or "", wrong=UsageError)


@contextmanager
def _file(target: str | None) -> Iterator[FromFile | None]:
    """While its surroundings hold. What its code prints goes to stderr: stdout is for programs."""
    with redirect_stdout(sys.stderr), nullcontext() if target is None else from_file(target, OWN) as found:
        yield found


def _on(job: str, target: str | None, ask: Callable[[BatchJob[Any]], T], shown: Callable[[str, T], int]) -> int:
    """What `ask` says of the job is handed to `shown` with its reference. The exit code."""

    def body() -> int:
        if not _JOB.fullmatch(job):
            raise WrongArguments(f"{job!r} names no batch: write PREFIX/MODEL@ID, as `submit` and `list` print it")
        with _file(target) as found:
            resumed = batch_resume(job, None if found is None else _call(found, job.rpartition("@")[0]))
            told = _there(resumed, ask)
        return shown(resumed.reference, told)

    return ended(body, target or "", wrong=UsageError)


def _there(job: BatchJob[Any], ask: Callable[[BatchJob[Any]], T]) -> T:
    try:
        return ask(job)
    except ProviderError as exc:
        if exc.failure.kind is not FailureKind.NOT_FOUND:
            raise
        prefix = job.model.partition("/")[0]
        raise WrongArguments(
            f"{prefix} has no batch {job.id!r}: `diptych batch list {prefix}` shows those it has"
        ) from exc


def _call(found: FromFile, model: str | None) -> Call[..., Any, Any]:
    if isinstance(found.value, Prompt):
        return call_of(found.value, found.name, model)
    if isinstance(found.value, Call):
        return found.value
    kind = "an agent" if isinstance(found.value, Agent) else "a plain function"
    raise WrongArguments(f"{found.name} is {kind}: a batch takes a function that is decorated with @llm.call")


def _awaited(job: BatchJob[Any], poll_s: float) -> BatchStatus:
    last: list[str] = []

    def progress(told: BatchStatus) -> None:
        if (line := _line(told)) not in last:
            last[:] = [line]
            noted(line)

    try:
        return job.wait(poll_s=poll_s, on_progress=progress)
    except KeyboardInterrupt:
        noted(f"the batch goes on: `diptych batch wait {job.reference}`, or `diptych batch cancel {job.reference}`")
        raise


def _shown(reference: str, told: BatchStatus, *, as_json: bool = False) -> int:
    if as_json:
        print(json_of({"job": reference, **_members(told)}, reference).decode())
    else:
        begun = f"{datetime.fromtimestamp(told.created_at, UTC):%Y-%m-%d %H:%M:%SZ}" if told.created_at else ""
        print("  ".join(filter(None, [reference, begun, told.call, _line(told)])))
    return 0


def _members(told: BatchStatus) -> dict[str, Any]:
    names = ("id", "state", "native", "total", "completed", "failed", "faults", "call", "created_at")
    return {name: getattr(told, name) for name in names}


def _line(told: BatchStatus) -> str:
    failed = f", {told.failed} failed" if told.failed else ""
    faults = f": {'; '.join(told.faults[:5])}" if told.faults else ""
    return f"{told.native}, {told.done} of {told.total}{failed}{faults}"


def _told(found: BatchResults[Any]) -> int:
    for one in found:
        sys.stdout.write(json_of(_result(one), one.id).decode() + "\n")
    sys.stdout.flush()
    spent, num_failed = found.spent, len(found.failed)
    dollars = "" if not spent.dollars else f", ${spent.dollars:f}"
    tokens = f"{spent.input_tokens} tokens in, {spent.output_tokens} out{dollars}"
    noted(f"{len(found.good)} of {_of(len(found), 'item')} answered, {num_failed} failed; {tokens}")
    return FAILED if num_failed else 0


def _result(one: BatchResult[Any]) -> dict[str, Any]:
    if one.error is not None:
        error = {"type": type(one.error).__name__, "message": one.error.message, "text": one.error.text}
        return {"id": one.id, "error": error}
    reply = one.reply
    assert reply is not None
    if isinstance(reply.result, Unset):
        return {"id": one.id, "tool_calls": [{"name": it.name, "arguments": it.arguments} for it in reply.tool_calls]}
    return {"id": one.id, "value": reply.result}


def _of(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
