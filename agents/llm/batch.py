"""`llm.batch`: many calls of one function as a batch, which nobody waits for at a connection and which costs less.

The requests are those of the function itself, the results as typed as its own. Where batches are answered:
batch_places.py. A job is data (to_json), so that another process can go on with it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from diptych.cluster.gateway.restoring import restoring
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.messages import said
from diptych.protos.providers.codec import Outgoing

from .attempts import Attempt
from .batch_places import BatchStatus, Line, Place, place_of
from .batch_results import BatchResult, BatchResults
from .call import Call, call
from .draft import Draft, Encoded, canonical_of, encoded
from .errors import CallFailed, ProviderError, UsageError
from .exchange import prepared, value_of
from .machine import Machine, Sleep, adrive, drive, take, verb
from .profiles import Profile
from .registry import POOL_NAME, Registry, current, default_registry
from .reply import Reply
from .tool_context import Context, Injection
from .usage import spent_of

T = TypeVar("T")
U = TypeVar("U")
Progress = Callable[[BatchStatus], object]
_VERSION = 1
_FIRST_PAUSE_S = 0.1
_MOST_NAME = 64  # characters of a function's name that a place keeps
_MOST_LABEL = 512  # of a value that is kept with a batch
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob(Generic[T]):
    """A batch that was submitted. `ids` are the items', in their order; `model` is the reference of who answers;
    `digest` tells its requests from others. One that was found by its reference knows of these `model` alone, and asks
    the place for the ids.
    """

    id: str
    model: str
    name: str
    ids: tuple[str, ...]
    digest: str
    created_at: float
    draft: Draft[T] = field(repr=False)  # what all items have in common
    drafts: Mapping[str, Draft[T]] = field(default_factory=dict, repr=False)

    @property
    def reference(self) -> str:
        """PREFIX/MODEL@ID: enough for batch_resume, wherever the prefix means the same place."""
        return f"{self.model}@{self.id}"

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
                    name = self.name or "FUNCTION"
                    exc.add_note(f"the batch is not lost: llm.batch_resume({self.reference!r}, {name})")
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
        place of the rest. Raises UsageError where it is not over yet, or is another function's; ProviderError where it
        was refused as a whole.
        """
        status = yield from self._asked(lambda place: place.status(self.id))
        if self.name and status.call and status.call != self.name[:_MOST_NAME]:
            raise UsageError(f"the batch {self.id} is of {status.call}, not of {self.name}", "fn")
        if not status.is_over:
            raise UsageError(
                f"the batch {self.id} is {status.native} ({status.done} of {status.total}): job.wait() first"
            )
        if status.state == "failed" and not status.raw.get("output_file_id"):
            words = "; ".join(status.faults[:5]) or "it says no more"
            failure = Failure(kind=FailureKind.BAD_REQUEST, message=f"the batch {self.id} was refused: {words}")
            raise ProviderError(failure, self.model)
        lines = yield from self._asked(lambda place: place.lines(status))
        ids = self.ids or (yield from self._asked(lambda place: place.ids(status))) or sorted(lines)
        sent = self._sent()
        nothing = Line(failure=_lost(status))
        return BatchResults([self._result(name, lines.get(name, nothing), sent) for name in ids], status)

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


def _begun(
    fn: Call[..., Any, T],
    items: Sequence[Any] | Mapping[str, Any],
    model: str | None,
    window: str,
    state_file: str | os.PathLike[str] | None,
) -> Machine[BatchJob[T]]:
    """The job that is kept in `state_file`, or a new one, which is kept there."""
    job, requests = yield from _prepared(fn, items, model)
    if state_file is None:
        return (yield from _submitted(job, requests, window))
    file = Path(state_file)
    if os.path.exists(file):  # Path's raises for a name that is too long
        return _kept(job, fn, file)
    with _reserved(file) as beside:
        if file.exists():  # another program was faster
            return _kept(job, fn, file)
        job = yield from _submitted(job, requests, window)
        try:
            beside.write_text(job.to_json())
            beside.replace(file)
        except OSError as exc:
            exc.add_note(f"the batch is not lost: {job.reference}")
            raise
    return job


def _submitted(job: BatchJob[T], requests: Mapping[str, Outgoing], window: str) -> Machine[BatchJob[T]]:
    place = place_of(job.draft.target()[0], job.model)
    place.check(job.ids)
    told = {"diptych_call": job.name[:_MOST_NAME], "diptych_digest": job.digest}
    if len(job.model) <= _MOST_LABEL:
        told["diptych_model"] = job.model
    try:
        found = yield from place.submit(requests, window, told)
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
        _check_fits(call, name, args, kwargs)
        try:
            draft = yield from call.draft(*args, **kwargs)
        except Exception as exc:  # of the function's own code
            exc.add_note(f"{call.__name__}: the item {name!r}")
            raise
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
    if isinstance(item, inspect.BoundArguments):
        return item.args, item.kwargs
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


def _check_fits(call: Call[..., Any, Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the function runs: a TypeError of its own code is another matter."""
    injection = Injection.of(call.function, call.__name__)
    if injection is not None:
        args, kwargs = injection.filled(args, kwargs, Context(deps=None))
    try:
        inspect.signature(call.function).bind(*args, **kwargs)
    except TypeError as exc:
        raise UsageError(f"{call.__name__}: the item {name!r} does not fit its parameters: {exc}", "items") from exc


@contextmanager
def _reserved(file: Path) -> Iterator[Path]:
    """The file beside it where the job is written first. A batch that cannot be kept is not begun, it would be paid for
    and lost; neither is one that another program is beginning. Raises UsageError.
    """
    beside = file.with_name(f"{file.name}.new")
    try:
        beside.touch(exist_ok=False)
    except FileExistsError as exc:
        raise UsageError(
            f"llm.batch: state_file: {beside} is there: another program begins the batch right now, or was ended while "
            f"it did; where none runs, llm.batch_list tells whether there is a batch, and without the file it is begun",
            "state_file",
        ) from exc
    except OSError as exc:
        raise UsageError(
            f"llm.batch: state_file: {file} cannot be written to ({exc.strerror}): give the path of a file that can",
            "state_file",
        ) from exc
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


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
        state_file: str | os.PathLike[str] | None = None,
    ) -> BatchJob[T]:
        return drive(_begun(fn, items, model, window, state_file))

    async def aio(
        self,
        fn: Call[..., Any, T],
        items: Sequence[Any] | Mapping[str, Any],
        *,
        model: str | None = None,
        window: str = "24h",
        state_file: str | os.PathLike[str] | None = None,
    ) -> BatchJob[T]:
        """The same as a coroutine."""
        return await adrive(_begun(fn, items, model, window, state_file))


class _BatchList:
    """`llm.batch_list(prefix)`: the batches of a place by their references, the newest first, as far as it shows them
    to this key. Without a registry: the one that holds here. Raises UsageError, Unsupported, ProviderError.
    """

    def __call__(
        self, prefix: str = POOL_NAME, *, limit: int = 20, registry: Registry | None = None
    ) -> dict[str, BatchStatus]:
        return drive(_listed(prefix, limit, registry))

    async def aio(
        self, prefix: str = POOL_NAME, *, limit: int = 20, registry: Registry | None = None
    ) -> dict[str, BatchStatus]:
        """The same as a coroutine."""
        return await adrive(_listed(prefix, limit, registry))


batch = _Batch()
batch_begin = _BatchBegin()
batch_list = _BatchList()


def _listed(prefix: str, limit: int, registry: Registry | None) -> Machine[dict[str, BatchStatus]]:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UsageError(f"llm.batch_list: limit is a number of batches above 0, not {limit!r}", "limit")
    upstream, _ = (registry or current().registry or default_registry()).resolve(f"{prefix}/-")
    try:
        found = yield from place_of(upstream, prefix).listed(limit)
    except ProviderFailure as exc:
        raise ProviderError(exc.failure, prefix) from exc
    return {f"{prefix}/{status.model.partition('/')[2]}@{status.id}": status for status in found}


@overload
def batch_resume(text: str, fn: None = None) -> BatchJob[str]: ...
@overload
def batch_resume(text: str, fn: Call[..., Any, T]) -> BatchJob[T]: ...
def batch_resume(text: str, fn: Call[..., Any, Any] | None = None) -> BatchJob[Any]:
    """The job that `to_json` wrote, or that a reference PREFIX/MODEL@ID names, of the function that it was made for;
    without one, its results are texts. A reference without MODEL takes the function's. Replies of such a job have no
    messages of the prompt, which stay with whoever made it. Raises UsageError.
    """
    if fn is not None:
        _check_call(fn, "llm.batch_resume")
    told = _referred(text, fn) if "{" not in text and "@" in text else _told(text)
    try:
        job: BatchJob[Any] = BatchJob(
            id=str(told["id"]),
            model=str(told["model"]),
            name=str(told["name"]),
            ids=tuple(map(str, told["ids"])),
            digest=str(told["digest"]),
            created_at=float(told["created_at"]),
            draft=(fn or _texts(str(told["model"]))).blank(),
        )
    except (KeyError, TypeError) as exc:
        raise UsageError(f"llm.batch_resume: this is no job that BatchJob.to_json wrote: {exc!r}", "text") from exc
    if fn is None:
        return replace(job, name="")
    if job.name != fn.__name__:
        raise UsageError(f"llm.batch_resume: the job is of {job.name}, not of {fn.__name__}", "fn")
    return job


def _told(text: str) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(text)
        version = told["version"]
    except (KeyError, TypeError, ValueError) as exc:
        raise UsageError(
            f"llm.batch_resume: this is neither PREFIX/MODEL@ID nor what BatchJob.to_json wrote: {text!r:.80}", "text"
        ) from exc
    if version != _VERSION:
        raise UsageError(f"llm.batch_resume: a job of version {version!r}; this is version {_VERSION}", "text")
    return told


def _referred(reference: str, fn: Call[..., Any, Any] | None) -> dict[str, Any]:
    target, _, name = reference.rpartition("@")
    prefix, slash, model = target.partition("/")
    if not slash or not prefix or not name:
        raise UsageError(f"llm.batch_resume: {reference!r} names no batch: write PREFIX/MODEL@ID", "text")
    if not model:
        model = (fn.blank().model.partition("/")[2] if fn is not None else "") or "-"
    told = {"id": name, "model": f"{prefix}/{model}", "name": "" if fn is None else fn.__name__, "ids": ()}
    return {**told, "digest": "", "created_at": 0.0}


def _texts(model: str) -> Call[..., Any, str]:
    """Whose answers are read as they are."""

    @call(model)
    def text() -> str:
        return "-"

    return text


def _run(
    fn: Call[..., Any, T],
    items: Sequence[Any] | Mapping[str, Any],
    model: str | None,
    window: str,
    poll_s: float,
    on_progress: Progress | None,
    state_file: str | os.PathLike[str] | None,
) -> Machine[BatchResults[T]]:
    _check_waiting(poll_s, on_progress)
    job = yield from _begun(fn, items, model, window, state_file)
    yield from job.wait.machine(poll_s=poll_s, on_progress=on_progress)
    return (yield from job.results.machine())


def _kept(job: BatchJob[T], fn: Call[..., Any, T], file: Path) -> BatchJob[T]:
    try:
        kept = batch_resume(file.read_text("utf-8"), fn)
    except (OSError, ValueError) as exc:  # the latter of no text, or as UsageError
        raise UsageError(f"{file}: {exc}", "state_file") from exc
    if kept.digest != job.digest:
        raise UsageError(
            f"{file}: the batch that is kept there has other requests than these items make; give another state_file, "
            f"or remove it",
            "state_file",
        )
    return replace(job, id=kept.id, created_at=kept.created_at)
