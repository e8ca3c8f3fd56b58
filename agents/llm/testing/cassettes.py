"""Answers of a real model, kept in a file and played again: Recorder writes it, Player reads it.

A cassette is lines of JSON: first the target (its wire format and what it can do), then each request with its answer. A
request is told by its path and body; headers, and with them keys, are not written, nor are the fields of bodies that
hold them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, fields
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import TypeAdapter

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Codec, Outgoing
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Event, Reply, ReplyBuilder, Usage

from ..errors import UsageError
from ..profiles import Profile
from ..upstream import Limits, Upstream, Wire
from ..usage import public_cost

JsonObject = dict[str, Any]
_FORMAT: Final = "diptych-cassette"
_VERSION: Final = 1
_EVENTS: Final[Mapping[str, type[Any]]] = {kind.__name__: kind for kind in get_args(Event)}
_SECRETS: Final = frozenset(
    "authorization authorization_token api_key apikey token access_token password secret".split()
)
_MOST_DIFF_LINES: Final = 40


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class CassetteMismatch(AssertionError):
    """A request that the cassette has no answer for, with the difference to the one that is closest."""


class Recorder:
    """Passes everything on to `upstream`, and writes it to `path`, which begins anew. Failures are written, too."""

    def __init__(self, upstream: Upstream, path: str | os.PathLike[str]) -> None:
        self.upstream = upstream
        self.path = Path(path)
        self.name: str = upstream.name
        self.family: str = upstream.family
        self.codec: Codec = upstream.codec
        self.quirks: Quirks = upstream.quirks
        self.profile: Profile = upstream.profile
        self._lock = threading.Lock()
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "name": self.name,
            "family": self.family,
            "codec": self.codec.name,
            "quirks": _adapter(Quirks).dump_python(self.quirks, mode="json"),
            "profile": _adapter(Profile).dump_python(self.profile, mode="json"),
        }
        self.path.write_text(_line(head), encoding="utf-8")

    async def whole(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> Reply:
        """See Upstream."""
        asked = _asked(outgoing, is_stream=False)
        try:
            reply = await self.upstream.whole(outgoing, limits, wire)
        except ProviderFailure as exc:
            self._write(asked, [], wire, failure=exc, is_complete=True)
            raise
        self._write(asked, reply.events(), wire, failure=None, is_complete=True)
        return reply

    async def stream(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> AsyncGenerator[Event, None]:
        """See Upstream."""
        asked = _asked(outgoing, is_stream=True)
        told: list[Event] = []
        failed: ProviderFailure | None = None
        is_complete = False
        events = self.upstream.stream(outgoing, limits, wire)
        try:
            async for event in events:
                told.append(event)
                yield event
            is_complete = True
        except ProviderFailure as exc:
            failed, is_complete = exc, True
            raise
        finally:
            await events.aclose()
            self._write(asked, told, wire, failure=failed, is_complete=is_complete)

    async def ready(self, request: ChatRequest) -> ChatRequest:
        """See Upstream."""
        return await self.upstream.ready(request)

    def cost(self, model: str, usage: Usage) -> Decimal | None:
        """See Upstream."""
        return self.upstream.cost(model, usage)

    def identity(self) -> str:
        """See Upstream."""
        return self.upstream.identity()

    def _write(
        self, asked: JsonObject, events: list[Event], wire: Wire, *, failure: ProviderFailure | None, is_complete: bool
    ) -> None:
        entry: JsonObject = {
            "hash": _hash(asked),
            "request": asked,
            "events": [[type(event).__name__, asdict(event)] for event in events],
            "raw": wire.raw,
            "status": wire.status,
            "request_id": wire.request_id,
        }
        if failure is not None:
            entry["failure"] = {**asdict(failure.failure), "target": failure.target}
        if not is_complete:
            entry["left"] = True
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


class Player:
    """Answers as the cassette at `path` does, each recorded answer once; equal requests are answered in their order.
    Raises CassetteMismatch for any other request, UsageError where the file is no cassette. Nothing is reached, media
    behind addresses included.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        head, *entries = _read(self.path)
        self.name: str = head["name"]
        self.family: str = head["family"]
        self.codec: Codec = by_name(head["codec"])
        self.quirks: Quirks = _adapter(Quirks).validate_python(head["quirks"])
        self.profile: Profile = _adapter(Profile).validate_python(head["profile"])
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[JsonObject]] = {}
        self._played: set[str] = set()
        for entry in entries:
            self._waiting.setdefault(entry["hash"], deque()).append(entry)

    @property
    def left(self) -> int:
        """Answers that were not played."""
        return sum(map(len, self._waiting.values()))

    async def whole(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> Reply:
        """See Upstream."""
        entry = self._take(_asked(outgoing, is_stream=False), wire)
        _fail(entry)
        builder = ReplyBuilder()
        for event in _events(entry):
            builder.add(event)
        return builder.reply()

    async def stream(self, outgoing: Outgoing, limits: Limits, wire: Wire) -> AsyncGenerator[Event, None]:
        """See Upstream."""
        entry = self._take(_asked(outgoing, is_stream=True), wire)
        for event in _events(entry):
            yield event
        _fail(entry)
        if entry.get("left"):
            raise CassetteMismatch(f"{self.path}: the stream was left here when it was recorded; record it to its end")

    async def ready(self, request: ChatRequest) -> ChatRequest:
        """Nothing is fetched."""
        return request

    def cost(self, model: str, usage: Usage) -> Decimal | None:
        """By public prices."""
        return public_cost(self.name, model, usage)

    def identity(self) -> str:
        """Its name and its file."""
        return f"player {self.name} {self.path}"

    def _take(self, asked: JsonObject, wire: Wire) -> JsonObject:
        name = _hash(asked)
        with self._lock:
            waiting = self._waiting.get(name)
            if not waiting:
                raise CassetteMismatch(self._difference(asked, was_played=name in self._played))
            entry = waiting.popleft()
            self._played.add(name)
        wire.raw.extend(entry["raw"])
        wire.status, wire.request_id = entry["status"], entry["request_id"]
        return entry

    def _difference(self, asked: JsonObject, *, was_played: bool) -> str:
        if was_played:
            return f"{self.path} has this request, and all its answers were played: record one for each time it is made"
        new = _lines(asked)
        others = [_lines(waiting[0]["request"]) for waiting in self._waiting.values() if waiting]
        if not others:
            return f"{self.path} has no answer left, and here is one more request:\n" + "\n".join(
                new[:_MOST_DIFF_LINES]
            )
        closest = max(others, key=lambda old: difflib.SequenceMatcher(None, old, new, autojunk=False).ratio())
        diff = list(difflib.unified_diff(closest, new, "recorded", "now", lineterm="", n=1))
        more = len(diff) - _MOST_DIFF_LINES
        told = [*diff[:_MOST_DIFF_LINES], *([f"... and {more} lines more"] if more > 0 else [])]
        return f"{self.path} has no answer to this request; record it anew, or see what changed:\n" + "\n".join(told)


def _asked(outgoing: Outgoing, *, is_stream: bool) -> JsonObject:
    return {"stream": is_stream, "path": outgoing.path, "body": _without_keys(json.loads(json.dumps(outgoing.body)))}


def _without_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "hidden"
            if name.lower().replace("-", "_") in _SECRETS and isinstance(inner, str)
            else _without_keys(inner)
            for name, inner in value.items()
        }
    return [_without_keys(inner) for inner in value] if isinstance(value, list) else value


def _hash(asked: JsonObject) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]


def _line(entry: JsonObject) -> str:
    return json.dumps(entry, ensure_ascii=True, separators=(",", ":"), default=str) + "\n"


def _lines(asked: JsonObject) -> list[str]:
    told = json.dumps(asked, indent=1, sort_keys=True, ensure_ascii=False).splitlines()
    return [line if len(line) <= 160 else f"{line[:157]}..." for line in told]


def _read(path: Path) -> list[JsonObject]:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"there is no cassette at {path}: make one with Recorder(upstream, path)") from None
    except ValueError as exc:
        raise UsageError(f"{path} is no cassette: {exc}") from exc
    head = found[0] if found else {}
    if not isinstance(head, dict) or head.get("format") != _FORMAT or head.get("version") != _VERSION:
        raise UsageError(f"{path} is no cassette of version {_VERSION}: its first line says what it is; record it anew")
    return found


def _events(entry: JsonObject) -> list[Event]:
    found: list[Event] = []
    for name, given in entry["events"]:
        kind = _EVENTS[name]
        known = {one.name for one in fields(kind)}
        found.append(kind(**{field: value for field, value in given.items() if field in known}))
    return found


def _fail(entry: JsonObject) -> None:
    if (told := entry.get("failure")) is not None:
        target = told.pop("target", "")
        raise ProviderFailure(Failure(**{**told, "kind": FailureKind(told["kind"])}), target)
