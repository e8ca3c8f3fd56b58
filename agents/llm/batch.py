"""`llm.batch`: many calls of one function as a batch, which nobody waits for at a connection and which costs less.

The requests are those of the function itself, the results as typed as its own. Where batches are answered:
batch_places.py. A job is data (to_json), so that another process can go on with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from diptych.cluster.gateway.restoring import restoring
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.messages import said
from diptych.protos.providers.codec import Outgoing

from .attempts import Attempt
from .batch_places import BatchStatus, Line, Place, place_of
from .call import Call
from .draft import Draft, Encoded, canonical_of, encoded
from .errors import CallFailed, ProviderError, UsageError
from .exchange import prepared, value_of
from .machine import Machine, Sleep, adrive, drive, take, verb
from .profiles import Profile
from .reply import Reply, Unset
from .usage import Spent, spent_of, total

T = TypeVar("T")
U = TypeVar("U")
Progress = Callable[[BatchStatus], object]
_VERSION = 1
_FIRST_PAUSE_S = 0.1
_MOST_FAILED_POLLS = 10  # in a row; then the batch goes on, and whoever asked is told
_PASSING = frozenset(
    {
        FailureKind.RATE_LIMITED,
        FailureKind.OVERLOADED,
        FailureKind.SERVER,
        FailureKind.CONNECT,
        FailureKind.IDLE_TIMEOUT,
    }
)


@dataclass(frozen=True, slots=True)
class BatchResult(Generic[T]):
    """Of one item. `reply` is there where the model answered with a value, or calls tools; else `error` says why not,
    with what the model said in `error.text`.
    """

    id: str
    reply: Reply[T] | None = None
    error: CallFailed | None = None

    @property
    def is_good(self) -> bool:
        """Whether it was answered: with a value, or with calls of tools."""
        return self.error is None

    @property
    def value(self) -> T:
        """The value. Raises the item's error."""
        if self.error is not None:
            raise self.error
        assert self.reply is not None
        return self.reply.value

    @property
    def spent(self) -> Spent:
        """Tokens; dollars are known of own clusters alone, others price batches otherwise."""
        attempts = self.reply.attempts if self.reply is not None else self.error.attempts if self.error else ()
        return total(attempt.spent for attempt in attempts)


class BatchResults(Sequence[BatchResult[T]]):
    """One for each item, in the items' order."""

    def __init__(self, results: Sequence[BatchResult[T]], status: BatchStatus) -> None:
        self.status = status
        self._results = tuple(results)
        self._by_id = {one.id: one for one in results}

    @overload
    def __getitem__(self, at: int) -> BatchResult[T]: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[BatchResult[T], ...]: ...
    def __getitem__(self, at: int | slice) -> BatchResult[T] | tuple[BatchResult[T], ...]:
        return self._results[at]

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[BatchResult[T]]:
        return iter(self._results)

    def by_id(self, name: str) -> BatchResult[T]:
        """Raises KeyError."""
        return self._by_id[name]

    @property
    def good(self) -> tuple[BatchResult[T], ...]:
        """Those that were answered."""
        return tuple(one for one in self if one.is_good)

    @property
    def failed(self) -> tuple[BatchResult[T], ...]:
        """Those with an error."""
        return tuple(one for one in self if not one.is_good)

    @property
    def values(self) -> dict[str, T]:
        """By ids, of those that have one: neither of failed ones nor of those whose model calls tools."""
        return {one.id: one.value for one in self.good if one.reply is None or not isinstance(one.reply.result, Unset)}

    @property
    def spent(self) -> Spent:
        """Of all items."""
        return total(one.spent for one in self)

    def __repr__(self) -> str:
        return f"BatchResults({len(self.good)} good, {len(self.failed)} failed, {self.status.state})"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob(Generic[T]):
    """A batch that was submitted. `ids` are the items', in their order; `model` is the reference of who answers;
    `digest` tells its requests from others.
    """

    id: str
    model: str
    name: str
    ids: tuple[str, ...]
    digest: str
    created_at: float
    draft: Draft[T] = field(repr=False)  # what all items have in common
    drafts: Mapping[str, Draft[T]] = field(default_factory=dict, repr=False)

    @verb
    def status(self, /) -> Machine[BatchStatus]:
        """As it is now. Raises ProviderError."""
        return (yield from self._asked(lambda place: place.status(self.id)))

    @verb
    def cancel(self, /) -> Machine[BatchStatus]:
        """Stops it; what is answered already stays and can be had. Raises ProviderError, where a place
        does not take it of one that is over."""
        return (yield from self._asked(lambda place: place.cancel(self.id)))

    @verb
    def wait(self, /, *, poll_s: float = 10.0, on_progress: Progress | None = None) -> Machine[BatchStatus]:
        """Until it is over; asks every `poll_s` seconds, more often at first. `on_progress` hears each status in the
        caller's thread; what it raises ends the waiting, not the batch. Raises ProviderError where the place cannot be
        asked for long.
        """
        _check_waiting(poll_s, on_progress)
        pause_s, failed = min(_FIRST_PAUSE_S, poll_s), 0
        while True:
            try:
                status = yield from self._asked(lambda place: place.status(self.id))
            except ProviderError as exc:
                failed += 1
                if exc.failure.kind not in _PASSING or failed >= _MOST_FAILED_POLLS:
                    exc.add_note(f"the batch {self.id} is not lost: llm.batch_resume(job.to_json(), {self.name})")
                    raise
                yield from take(Sleep(max(pause_s, exc.failure.retry_after_s or 0.0)))
            else:
                failed = 0
                if on_progress is not None:
                    on_progress(status)
                if status.is_over:
                    return status
                yield from take(Sleep(pause_s))
            pause_s = min(pause_s * 1.5, poll_s)

    @verb
    def results(self, /) -> Machine[BatchResults[T]]:
        """Of a batch that is over, also of one that was cancelled or has expired: what was answered, and errors in
        place of the rest. Raises UsageError where it is not over yet, ProviderError where it was refused as a whole.
        """
        status = yield from self._asked(lambda place: place.status(self.id))
        if not status.is_over:
            raise UsageError(
                f"the batch {self.id} is {status.native} ({status.done} of {status.total}): job.wait() first"
            )
        if status.state == "failed" and not status.raw.get("output_file_id"):
            words = "; ".join(status.faults[:5]) or "it says no more"
            failure = Failure(kind=FailureKind.BAD_REQUEST, message=f"the batch {self.id} was refused: {words}")
            raise ProviderError(failure, self.model)
        lines = yield from self._asked(lambda place: place.lines(status))
        sent = self._sent()
        nothing = Line(failure=_lost(status))
        return BatchResults([self._result(name, lines.get(name, nothing), sent) for name in self.ids], status)

    def to_json(self) -> str:
        """All that another process needs, beside the function: see batch_resume."""
        told = {"version": _VERSION, "id": self.id, "model": self.model, "name": self.name, "ids": self.ids}
        return json.dumps({**told, "digest": self.digest, "created_at": self.created_at})

    def _asked(self, ask: Callable[[Place], Machine[U]]) -> Machine[U]:
        upstream, _ = self._blank().target()
        try:
            return (yield from ask(place_of(upstream, self.model)))
        except ProviderFailure as exc:
            raise ProviderError(exc.failure, self.model) from exc

    def _blank(self) -> Draft[T]:
        """A draft of the function's without a prompt."""
        return replace(self.draft, model=self.model, messages=(said("user", "-"),))

    def _sent(self) -> Encoded:
        """As each request went out, but for its messages: what an answer has to be read by."""
        draft = self._blank()
        upstream, model = draft.target()
        return encoded(draft, upstream, model, canonical_of(draft, upstream, model), stream=False)

    def _result(self, name: str, line: Line, sent: Encoded) -> BatchResult[T]:
        draft = self.drafts.get(name) or replace(self._blank(), messages=())
        if line.failure is not None:
            return self._failed(name, ProviderError(line.failure, self.model), Attempt(number=1, model=self.model))
        raw = [] if line.body is None else [line.body]
        try:
            answer = line.answer or sent.upstream.codec.reply(line.body or {}, sent.upstream.quirks)
        except ProviderFailure as exc:
            return self._failed(
                name, ProviderError(exc.failure, self.model), Attempt(number=1, model=self.model, raw=raw)
            )
        undone = restoring(sent.request, sent.outgoing.notes)
        answer = answer if undone is None else undone.reply(answer)
        dollars = sent.upstream.cost(sent.model, answer.usage) if _is_own(sent.upstream.profile) else None
        attempt = Attempt(
            number=1,
            model=self.model,
            answer=answer,
            spent=spent_of(answer.usage, dollars),
            request_id=line.request_id,
            raw=raw,
        )
        try:
            result = value_of(draft, answer)
        except CallFailed as exc:
            return self._failed(name, exc, attempt)
        return BatchResult(name, Reply(draft=draft, answer=answer, attempts=(attempt,), result=result))

    def _failed(self, name: str, error: CallFailed, attempt: Attempt) -> BatchResult[T]:
        error.attempts = (replace(attempt, error=error),)
        return BatchResult(name, error=error)


def _is_own(profile: Profile) -> bool:
    return profile.is_own


def _lost(status: BatchStatus) -> Failure:
    """Of an item that the results do not tell of."""
    kinds = {"cancelled": FailureKind.CANCELLED, "expired": FailureKind.TOTAL_TIMEOUT}
    words = f"the results of the batch, which is {status.native}, have no line for it"
    return Failure(kind=kinds.get(status.state, FailureKind.SERVER), message=words, code="no_line")


def _begin(
    fn: Call[..., Any, T], items: Sequence[Any] | Mapping[str, Any], model: str | None, window: str
) -> Machine[BatchJob[T]]:
    job, requests = yield from _prepared(fn, items, model)
    place = place_of(job.draft.target()[0], job.model)
    place.check(job.ids)
    try:
        found = yield from place.submit(requests, window, {"diptych_call": job.name[:64], "diptych_digest": job.digest})
    except ProviderFailure as exc:
        raise ProviderError(exc.failure, job.model) from exc
    return replace(job, id=found, created_at=time.time())


def _prepared(
    fn: Call[..., Any, T], items: Sequence[Any] | Mapping[str, Any], model: str | None
) -> Machine[tuple[BatchJob[T], dict[str, Outgoing]]]:
    _check_call(fn, "llm.batch")
    drafts: dict[str, Draft[T]] = {}
    requests: dict[str, Outgoing] = {}
    call = fn if model is None else fn.with_(model)
    digest = hashlib.sha256()
    for name, item in _named(items):
        args, kwargs = _arguments(item)
        try:
            draft = yield from call.draft(*args, **kwargs)
        except TypeError as exc:
            raise UsageError(f"{call.__name__}: the item {name!r} does not fit its parameters: {exc}", "items") from exc
        sent = yield from prepared(draft)
        drafts[name], requests[name] = draft, sent.outgoing
        digest.update(json.dumps([name, sent.outgoing.body], sort_keys=True).encode())
    first = next(iter(drafts.values()))
    digest.update(first.model.encode())
    found = BatchJob(
        id="",
        model=first.model,
        name=call.__name__,
        ids=tuple(drafts),
        digest=digest.hexdigest(),
        created_at=0.0,
        draft=replace(first, messages=()),
        drafts=drafts,
    )
    return found, requests


def _named(items: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(items, Mapping):
        named = [(str(name), item) for name, item in items.items()]
        if len({name for name, _ in named}) < len(named):
            twice = next(name for at, (name, _) in enumerate(named) if name in {one for one, _ in named[:at]})
            raise UsageError(f"llm.batch: two items have the id {twice!r}: ids are texts, and 1 is '1'", "items")
    elif isinstance(items, Sequence) and not isinstance(items, (str, bytes)):
        width = max(4, len(str(len(items))))
        named = [(f"item-{at:0{width}}", item) for at, item in enumerate(items)]
    else:
        raise UsageError(
            "llm.batch: items is a list of the function's arguments (a tuple, a dict, or the one argument itself), or "
            "a dict of them by their ids",
            "items",
        )
    if not named:
        raise UsageError("llm.batch: there are no items", "items")
    return named


def _arguments(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(item, tuple):
        return item, {}
    if isinstance(item, dict):
        return (), item
    return (item,), {}


def _check_waiting(poll_s: object, on_progress: object) -> None:
    is_number = isinstance(poll_s, int | float) and not isinstance(poll_s, bool)
    if not is_number or not 0 < poll_s < math.inf:  # type: ignore[operator]  # it is a number
        raise UsageError(f"llm.batch: poll_s is a number of seconds above 0, not {poll_s!r}", "poll_s")
    if on_progress is not None and not callable(on_progress):
        raise UsageError(f"llm.batch: on_progress is a function of a BatchStatus, not {on_progress!r}", "on_progress")


def _check_file(file: Path) -> None:
    """A batch that cannot be kept is not begun: it would be paid for, and lost."""
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        why = "is a folder" if file.is_dir() else "is in no folder that can be written to"
        raise UsageError(f"llm.batch: state_file: {file} {why}: give the path of a file in one that can", "state_file")


def _check_call(fn: object, where: str) -> None:
    if not isinstance(fn, Call):
        raise UsageError(f"{where}: the first argument is a function decorated with @llm.call, not {fn!r:.80}", "fn")


class _Batch:
    """`llm.batch(fn, items)`: submits the calls of all items as one batch, waits for it, and gives the results.

    items         a list of what the function takes (a tuple: its arguments; a dict: by their names; else the one
                  argument), or a dict of these by ids of your own
    model         PREFIX/MODEL in place of the function's
    window        within which it is to be answered: 24h, on own clusters any number of m, h, d
    poll_s        seconds between two questions how far it is; more often at first
    on_progress   hears each BatchStatus
    state_file    where the job is kept: when the program is run again with the same items, it goes on with the same
                  batch, or tells its results again

    An item that fails is a BatchResult with an error; nothing is asked again. Raises ProviderError where the batch
    cannot be had, UsageError. What interrupts the wait leaves the batch as it is.
    """

    def __call__(
        self,
        fn: Call[..., Any, T],
        items: Sequence[Any] | Mapping[str, Any],
        *,
        model: str | None = None,
        window: str = "24h",
        poll_s: float = 10.0,
        on_progress: Progress | None = None,
        state_file: str | os.PathLike[str] | None = None,
    ) -> BatchResults[T]:
        return drive(_run(fn, items, model, window, poll_s, on_progress, state_file))

    async def aio(
        self,
        fn: Call[..., Any, T],
        items: Sequence[Any] | Mapping[str, Any],
        *,
        model: str | None = None,
        window: str = "24h",
        poll_s: float = 10.0,
        on_progress: Progress | None = None,
        state_file: str | os.PathLike[str] | None = None,
    ) -> BatchResults[T]:
        """The same as a coroutine."""
        return await adrive(_run(fn, items, model, window, poll_s, on_progress, state_file))


class _BatchBegin:
    """`llm.batch_begin(fn, items)`: submits them and gives the job: `.status()`, `.wait()`, `.results()`, `.cancel()`,
    `.to_json()`. Arguments as those of llm.batch.
    """

    def __call__(
        self,
        fn: Call[..., Any, T],
        items: Sequence[Any] | Mapping[str, Any],
        *,
        model: str | None = None,
        window: str = "24h",
    ) -> BatchJob[T]:
        return drive(_begin(fn, items, model, window))

    async def aio(
        self,
        fn: Call[..., Any, T],
        items: Sequence[Any] | Mapping[str, Any],
        *,
        model: str | None = None,
        window: str = "24h",
    ) -> BatchJob[T]:
        """The same as a coroutine."""
        return await adrive(_begin(fn, items, model, window))


batch = _Batch()
batch_begin = _BatchBegin()


def batch_resume(text: str, fn: Call[..., Any, T]) -> BatchJob[T]:
    """The job that `to_json` wrote, of the function that it was made for. Replies of such a job have no messages of the
    prompt, which stay with whoever made it. Raises UsageError.
    """
    _check_call(fn, "llm.batch_resume")
    try:
        told = json.loads(text)
        if told["version"] != _VERSION:
            raise UsageError(
                f"llm.batch_resume: a job of version {told['version']!r}; this is version {_VERSION}", "text"
            )
        job = BatchJob(
            id=str(told["id"]),
            model=str(told["model"]),
            name=str(told["name"]),
            ids=tuple(map(str, told["ids"])),
            digest=str(told["digest"]),
            created_at=float(told["created_at"]),
            draft=fn.blank(),
        )
    except (KeyError, TypeError, ValueError) as exc:
        if isinstance(exc, UsageError):
            raise
        raise UsageError(f"llm.batch_resume: this is no job that BatchJob.to_json wrote: {exc!r}", "text") from exc
    if job.name != fn.__name__:
        raise UsageError(f"llm.batch_resume: the job is of {job.name}, not of {fn.__name__}", "fn")
    return job


def _run(
    fn: Call[..., Any, T],
    items: Sequence[Any] | Mapping[str, Any],
    model: str | None,
    window: str,
    poll_s: float,
    on_progress: Progress | None,
    state_file: str | os.PathLike[str] | None,
) -> Machine[BatchResults[T]]:
    file = None if state_file is None else Path(state_file)
    _check_waiting(poll_s, on_progress)
    if file is not None:
        _check_file(file)
    if file is not None and file.exists():
        job = yield from _kept(fn, items, model, file)
    else:
        job = yield from _begin(fn, items, model, window)
        if file is not None:
            _keep(job, file)
    yield from job.wait.machine(poll_s=poll_s, on_progress=on_progress)
    return (yield from job.results.machine())


def _kept(
    fn: Call[..., Any, T], items: Sequence[Any] | Mapping[str, Any], model: str | None, file: Path
) -> Machine[BatchJob[T]]:
    job, _ = yield from _prepared(fn, items, model)
    try:
        kept = batch_resume(file.read_text("utf-8"), fn)
    except ValueError as exc:  # UsageError, or no text
        raise UsageError(f"{file}: {exc}", "state_file") from exc
    if kept.digest != job.digest:
        raise UsageError(
            f"{file}: the batch that is kept there has other requests than these items make; give another state_file, "
            f"or remove it",
            "state_file",
        )
    return replace(job, id=kept.id, created_at=kept.created_at)


def _keep(job: BatchJob[Any], file: Path) -> None:
    """Whole or not at all."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.new")
    beside.write_text(job.to_json())
    beside.replace(file)
