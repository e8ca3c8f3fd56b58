"""Where batches are answered: OpenAI's form of them (its own, our clusters, those who copy it) and Anthropic's.

batch.py asks `place_of`. A place knows requests and answers as JSON, not what they mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, Protocol
from urllib.parse import quote

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.providers.codec import Outgoing
from diptych.protos.replies import Reply as Answer

from .batch_http import Asking, File, json_of, objects_in
from .errors import Unsupported, UsageError
from .machine import Machine, take
from .upstream import HttpUpstream, Upstream

JsonObject = dict[str, Any]
State = Literal["working", "cancelling", "completed", "failed", "expired", "cancelled"]
_OVER = frozenset({"completed", "failed", "expired", "cancelled"})
_ANTHROPIC_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OPENAI_ID_CHARS = 512
_MOST_LISTED = 100  # of one page


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatus:
    """How far a batch is. `native` is the place's own word for its state, `raw` all that it says; `faults` why it was
    refused as a whole. `call` and `model` say whose calls they are and who answers, where the place keeps that;
    `created_at`: seconds since 1970, 0 where it is not told.
    """

    id: str
    state: State
    native: str
    total: int = 0
    completed: int = 0
    failed: int = 0
    faults: tuple[str, ...] = ()
    call: str = ""
    model: str = ""
    created_at: float = 0.0
    raw: JsonObject = field(default_factory=dict, repr=False)

    @property
    def is_over(self) -> bool:
        """Nothing more comes."""
        return self.state in _OVER

    @property
    def done(self) -> int:
        """Requests that are answered, well or not."""
        return self.completed + self.failed


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one request: the answer, or a failure."""

    body: JsonObject | None = None
    failure: Failure | None = None
    request_id: str = ""
    answer: Answer | None = None  # of a place that speaks no wire format


class Place(Protocol):
    """One way to run batches."""

    def check(self, ids: Sequence[str]) -> None:
        """Raises UsageError for an id that the place does not take."""

    def submit(self, requests: Mapping[str, Outgoing], window: str, metadata: Mapping[str, str]) -> Machine[str]:
        """The new batch's id. Raises ProviderFailure."""

    def status(self, batch: str) -> Machine[BatchStatus]:
        """As it is now. Raises ProviderFailure."""

    def lines(self, status: BatchStatus) -> Machine[dict[str, Line]]:
        """By ids, of a batch that is over. Raises ProviderFailure."""

    def ids(self, status: BatchStatus) -> Machine[tuple[str, ...]]:
        """Of all items in their order; none where the place keeps no more than results. Raises ProviderFailure."""

    def cancel(self, batch: str) -> Machine[BatchStatus]:
        """Stops it. Raises ProviderFailure."""

    def listed(self, limit: int) -> Machine[list[BatchStatus]]:
        """The newest first. Raises ProviderFailure."""


def place_of(upstream: Upstream, model: str) -> Place:
    """Raises Unsupported where there are no batches. An upstream that has some of its own way has them as `batches`."""
    own: Place | None = getattr(upstream, "batches", None)
    if own is not None:
        return own
    if isinstance(upstream, HttpUpstream) and upstream.provider.via == "http":
        if upstream.codec.name == "openai.chat":
            return OpenAIPlace(upstream)
        if upstream.codec.name == "anthropic.messages" and upstream.provider.auth not in ("aws", "google"):
            return AnthropicPlace(upstream)
    raise Unsupported(
        f"{model}: no batches there: own clusters, OpenAI, those with its /files and /batches, and Anthropic have them",
        "model",
    )


class OpenAIPlace:
    """Files and batches of an API in OpenAI's form."""

    def __init__(self, upstream: HttpUpstream) -> None:
        self._upstream = upstream

    def check(self, ids: Sequence[str]) -> None:
        """See Place."""
        for name in ids:
            if not 0 < len(name) <= _OPENAI_ID_CHARS:
                raise UsageError(f"ids: {name[:40]!r}: 1 to {_OPENAI_ID_CHARS} characters", "ids")

    def submit(self, requests: Mapping[str, Outgoing], window: str, metadata: Mapping[str, str]) -> Machine[str]:
        """See Place."""
        path = next(iter(requests.values())).path
        endpoint = f"/v1{path}"
        lines = [
            json.dumps({"custom_id": name, "method": "POST", "url": endpoint, "body": one.body}, ensure_ascii=True)
            for name, one in requests.items()
        ]
        file = File("requests.jsonl", "\n".join(lines).encode(), {"purpose": "batch"})
        uploaded = json_of((yield from self._ask("POST", "/files", file)), "the answer to an upload")
        file_id = _text(uploaded, "id")
        body = {
            "input_file_id": file_id,
            "endpoint": endpoint,
            "completion_window": window,
            **({"metadata": dict(metadata)} if metadata else {}),
        }
        try:
            made = yield from self._ask("POST", "/batches", body)
        except ProviderFailure:
            yield from self._forget(file_id)
            raise
        return _text(json_of(made, "the new batch"), "id")

    def status(self, batch: str) -> Machine[BatchStatus]:
        """See Place."""
        return self._status(json_of((yield from self._ask("GET", f"/batches/{_named(batch)}")), "the batch"))

    def cancel(self, batch: str) -> Machine[BatchStatus]:
        """See Place."""
        return self._status(
            json_of((yield from self._ask("POST", f"/batches/{_named(batch)}/cancel", {})), "the batch")
        )

    def lines(self, status: BatchStatus) -> Machine[dict[str, Line]]:
        """See Place."""
        found: dict[str, Line] = {}
        for name in ("output_file_id", "error_file_id"):
            if file_id := status.raw.get(name):
                content = yield from self._ask("GET", f"/files/{_named(file_id)}/content")
                found.update((str(one.get("custom_id")), self._line(one)) for one in objects_in(content))
        return found

    def ids(self, status: BatchStatus) -> Machine[tuple[str, ...]]:
        """See Place. None where the file of requests is gone."""
        path = f"/files/{_named(status.raw.get('input_file_id') or '-')}/content"
        try:
            content = yield from self._ask("GET", path)
        except ProviderFailure as exc:
            if exc.failure.kind is not FailureKind.NOT_FOUND:
                raise
            return ()
        return tuple(str(one.get("custom_id")) for one in objects_in(content))

    def listed(self, limit: int) -> Machine[list[BatchStatus]]:
        """See Place."""
        return (yield from _pages(self._upstream, "/batches", "after", limit, self._status))

    def _line(self, told: JsonObject) -> Line:
        response, error = told.get("response"), told.get("error")
        if not isinstance(response, dict):
            return Line(failure=_never_answered(error if isinstance(error, dict) else {}))
        body, status = response.get("body"), int(response.get("status_code") or 0)
        request_id = str(response.get("request_id") or "")
        if 200 <= status < 300 and isinstance(body, dict):
            return Line(body, request_id=request_id)
        return Line(failure=self._upstream.codec.failure(status, {}, json.dumps(body).encode()), request_id=request_id)

    def _status(self, raw: JsonObject) -> BatchStatus:
        native, counts = str(raw.get("status")), raw.get("request_counts") or {}
        errors = (raw.get("errors") or {}).get("data") or []
        labels = raw.get("metadata") or {}
        return BatchStatus(
            id=_text(raw, "id"),
            state=native if native in _OVER or native == "cancelling" else "working",  # type: ignore[arg-type]
            native=native,
            total=counts.get("total", 0),
            completed=counts.get("completed", 0),
            failed=counts.get("failed", 0),
            faults=tuple(_fault(one) for one in errors if isinstance(one, dict)),
            call=str(labels.get("diptych_call") or ""),
            model=str(labels.get("diptych_model") or ""),
            created_at=float(raw.get("created_at") or 0),
            raw=raw,
        )

    def _ask(self, method: str, path: str, body: JsonObject | File | None = None) -> Machine[bytes]:
        return (yield from take(Asking(self._upstream, method, path, body)))

    def _forget(self, file_id: str) -> Machine[None]:
        try:
            yield from self._ask("DELETE", f"/files/{_named(file_id)}")
        except ProviderFailure:
            pass  # what stopped the batch is the error to tell; a file alone does no harm


class AnthropicPlace:
    """Anthropic's message batches."""

    def __init__(self, upstream: HttpUpstream) -> None:
        self._upstream = upstream

    def check(self, ids: Sequence[str]) -> None:
        """See Place."""
        for name in ids:
            if not _ANTHROPIC_ID.fullmatch(name):
                raise UsageError(f"ids: {name[:80]!r}: Anthropic takes 1 to 64 letters, digits, _ and -", "ids")

    def submit(self, requests: Mapping[str, Outgoing], window: str, metadata: Mapping[str, str]) -> Machine[str]:
        """See Place. There is one window, a day, and no metadata."""
        if window != "24h":
            raise UsageError(f"window: Anthropic answers batches within 24h; {window!r} cannot be asked for", "window")
        body = {"requests": [{"custom_id": name, "params": one.body} for name, one in requests.items()]}
        headers = _headers(requests.values())
        made = yield from take(Asking(self._upstream, "POST", "/messages/batches", body, headers))
        return _text(json_of(made, "the new batch"), "id")

    def status(self, batch: str) -> Machine[BatchStatus]:
        """See Place."""
        return self._status(json_of((yield from self._ask("GET", f"/messages/batches/{_named(batch)}")), "the batch"))

    def cancel(self, batch: str) -> Machine[BatchStatus]:
        """See Place."""
        told = yield from self._ask("POST", f"/messages/batches/{_named(batch)}/cancel", {})
        return self._status(json_of(told, "the batch"))

    def lines(self, status: BatchStatus) -> Machine[dict[str, Line]]:
        """See Place."""
        content = yield from self._ask("GET", f"/messages/batches/{_named(status.id)}/results")
        return {str(one.get("custom_id")): self._line(one.get("result")) for one in objects_in(content)}

    def ids(self, status: BatchStatus) -> Machine[tuple[str, ...]]:
        """See Place. Results alone are kept, of every item."""
        yield from ()
        return ()

    def listed(self, limit: int) -> Machine[list[BatchStatus]]:
        """See Place."""
        path = "/messages/batches"
        return (yield from _pages(self._upstream, path, "after_id", limit, self._status, _anthropic_version()))

    def _line(self, result: Any) -> Line:
        told = result if isinstance(result, dict) else {}
        kind, message = told.get("type"), told.get("message")
        if kind == "succeeded" and isinstance(message, dict):
            return Line(message)
        if kind == "errored":
            inner = told.get("error") or {}
            within = inner.get("error")
            error: JsonObject = within if isinstance(within, dict) else inner
            status = _ANTHROPIC_STATUS.get(str(error.get("type")), 500)
            body = json.dumps({"type": "error", "error": error}).encode()
            return Line(failure=self._upstream.codec.failure(status, {}, body))
        return Line(failure=_never_answered({"code": f"batch_{kind}" if kind else ""}))

    def _status(self, raw: JsonObject) -> BatchStatus:
        native, counts = str(raw.get("processing_status")), raw.get("request_counts") or {}
        succeeded, errored = counts.get("succeeded", 0), counts.get("errored", 0)
        lost = counts.get("canceled", 0) + counts.get("expired", 0)
        ended: State = "cancelled" if raw.get("cancel_initiated_at") else "completed"
        if counts.get("expired", 0) and not raw.get("cancel_initiated_at"):
            ended = "expired"
        states: dict[str, State] = {"ended": ended, "canceling": "cancelling"}
        return BatchStatus(
            id=_text(raw, "id"),
            state=states.get(native, "working"),
            native=native,
            total=succeeded + errored + lost + counts.get("processing", 0),
            completed=succeeded,
            failed=errored + lost,
            created_at=_seconds(raw.get("created_at")),
            raw=raw,
        )

    def _ask(self, method: str, path: str, body: JsonObject | None = None) -> Machine[bytes]:
        return (yield from take(Asking(self._upstream, method, path, body, _anthropic_version())))


def _anthropic_version() -> dict[str, str]:
    from diptych.protos.providers.anthropic_requests import VERSION, VERSION_HEADER

    return {VERSION_HEADER: VERSION}


_ANTHROPIC_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def _headers(requests: Any) -> dict[str, str]:
    """Of all requests; lists of words, as betas are, come together."""
    found: dict[str, str] = {}
    for one in requests:
        for name, value in one.headers.items():
            words = dict.fromkeys([*found.get(name, "").split(","), *value.split(",")])
            found[name] = ",".join(word for word in words if word)
    return found


def _pages(
    upstream: HttpUpstream,
    path: str,
    after: str,
    limit: int,
    read: Callable[[JsonObject], BatchStatus],
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Machine[list[BatchStatus]]:
    """Of lists that go on behind an id."""
    found: list[BatchStatus] = []
    while len(found) < limit:
        query = {"limit": str(min(limit - len(found), _MOST_LISTED)), **({after: found[-1].id} if found else {})}
        told = json_of((yield from take(Asking(upstream, "GET", path, headers=headers, query=query))), "the batches")
        page = [read(one) for one in told.get("data") or [] if isinstance(one, dict)]
        found += page
        if not page or not told.get("has_more"):
            break
    return found[:limit]


def _seconds(told: object) -> float:
    """Of a time as RFC 3339 writes it; 0 where it is none."""
    try:
        return datetime.fromisoformat(str(told)).timestamp()
    except ValueError:
        return 0.0


def _never_answered(error: JsonObject) -> Failure:
    code = str(error.get("code") or "")
    kind = FailureKind.CANCELLED if "cancel" in code else FailureKind.SERVER
    if "expired" in code or "timeout" in code:
        kind = FailureKind.TOTAL_TIMEOUT
    words = str(error.get("message") or "") or f"it was never answered{f' ({code})' if code else ''}"
    return Failure(kind=kind, message=words, code=code)


def _fault(error: JsonObject) -> str:
    line = f"line {error['line']}: " if error.get("line") is not None else ""
    return f"{line}{error.get('message') or error.get('code') or 'refused'}"


def _named(name: object) -> str:
    return quote(str(name), safe="")


def _text(told: JsonObject, name: str) -> str:
    value = told.get(name)
    if not isinstance(value, str) or not value:
        raise ProviderFailure(Failure(kind=FailureKind.SERVER, message=f"the answer has no {name}", code="malformed"))
    return value
