"""Answers that are kept, so that an equal call need not be made again: off unless a registry or a call has a Cache.

exchange.py and streams.py ask `recalled` before the first attempt. Equal is everything that an answer depends on: the
target, its address and whose key opens it, the whole body as it would go out, the result's type and how strictly it is
read, and the context of validators. The key is a digest, so that nothing of it can be read in a file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

from pydantic_core import PydanticSerializationError, to_json

from diptych.protos.deltas import Logprobs
from diptych.protos.replies import Began, Ended, Usage
from diptych.protos.replies import Reply as Answer

from .attempts import Attempt
from .cache_store import FileStore, MemoryStore, Store
from .errors import CallFailed, UsageError
from .machine import Machine, take
from .message_json import message_from_json, messages_to_json
from .usage import Spent

if TYPE_CHECKING:
    from .draft import Draft, Encoded
    from .reply import Reply

logger = logging.getLogger(__name__)
T = TypeVar("T")
_VERSION = 1
_ROUTING = frozenset({"x-session-id", "traceparent"})  # headers that decide where, not what


class Cache:
    """path        a file that several processes may share; None: this process's memory
    max_mib     the most that is kept; what was used least leaves first
    ttl_s       seconds after which an answer is not taken any more; None: never
    namespace   caches of different ones share no answer, whatever file they lie in
    sampled     also answers of calls whose temperature is not 0: the same sample again and again

    Kept are whole answers that gave a value, or that call tools: none that was cut off, declined, or came from a
    fallback. Raises UsageError for a file that is none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_mib: float = 64.0,
        ttl_s: float | None = None,
        namespace: str = "",
        sampled: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        if not max_mib > 0:
            raise UsageError(f"Cache(max_mib={max_mib!r}): it may be more than 0", "max_mib")
        if ttl_s is not None and not ttl_s > 0:
            raise UsageError(f"Cache(ttl_s={ttl_s!r}): it may be more than 0, or None for no end", "ttl_s")
        self.namespace = namespace
        self.sampled = sampled
        self.ttl_s = ttl_s
        self.hits = 0
        self.misses = 0
        self._now = now
        max_bytes = int(max_mib * (1 << 20))
        self._store: Store = MemoryStore(max_bytes) if path is None else FileStore(path, max_bytes)
        self._waits = path is not None

    @property
    def num_bytes(self) -> int:
        """That kept answers take."""
        return self._store.num_bytes()

    def clear(self) -> None:
        """Nothing is kept any more; of a file, nothing of anybody."""
        self._store.clear()

    def close(self) -> None:
        """Closes the file."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> bytes | None:
        """For `recalled`."""
        return self._store.get(key, 0.0 if self.ttl_s is None else self._now() - self.ttl_s)

    def put(self, key: str, value: bytes) -> None:
        """For `recalled`."""
        self._store.put(key, value, self._now())

    def drop(self, key: str) -> None:
        """For `recalled`."""
        self._store.drop(key)

    def apart(self, do: Callable[[], T]) -> Machine[T]:
        """`do`, beside the loop where it may wait for a file."""
        if self._waits:
            return (yield from take(_Apart(do)))
        return do()


@dataclass(slots=True)
class _Apart(Generic[T]):
    """A step: something that may wait for a file, in a thread."""

    do: Callable[[], T]

    async def perform(self) -> T:
        """Wait for it."""
        return await asyncio.to_thread(self.do)


@dataclass(slots=True)
class Recalled(Generic[T]):
    """Of one call: its reply, where one was kept; else what keeps the one that comes."""

    draft: Draft[T]
    cache: Cache | None = None
    key: str = ""
    reply: Reply[T] | None = None

    def keep(self, reply: Reply[T]) -> Machine[Reply[T]]:
        """`reply`, kept where it may be."""
        cache = self.cache
        if (
            cache is not None
            and reply.finish in ("stop", "tool_calls")
            and reply.attempts[-1].model == self.draft.model
        ):
            written = _written(reply)
            yield from cache.apart(lambda: cache.put(self.key, written))
        return reply


def recalled(draft: Draft[T]) -> Machine[Recalled[T]]:
    """Whether an equal call was answered before. What was kept is read by the present type: what it does not take any
    more is dropped, and the call is made. Raises UsageError, as the call would.
    """
    cache = draft.registry.cache if draft.cache is None else draft.cache
    if not isinstance(cache, Cache):
        return Recalled(draft)
    if not cache.sampled and _temperature(draft) != 0:
        return Recalled(draft)
    from .exchange import prepared

    key = key_of(cache, draft, (yield from prepared(draft)))
    if key is None:
        return Recalled(draft)
    found = yield from cache.apart(lambda: cache.get(key))
    reply = None if found is None else _read(draft, found)
    if reply is None:
        cache.misses += 1
        if found is not None:
            yield from cache.apart(lambda: cache.drop(key))
        return Recalled(draft, cache, key)
    cache.hits += 1
    return Recalled(draft, reply=reply)


def _temperature(draft: Draft[Any]) -> Any:
    return (draft.params.get("extra") or {}).get("temperature", draft.params.get("temperature"))


def key_of(cache: Cache, draft: Draft[Any], sent: Encoded) -> str | None:
    """None where the context of validators has no form in JSON, so that nobody can say whether two are equal."""
    output, outgoing = draft.output, sent.outgoing
    told = {
        "version": _VERSION,
        "namespace": cache.namespace,
        "target": sent.upstream.identity(),
        "model": sent.model,
        "path": outgoing.path,
        "headers": sorted((name, text) for name, text in outgoing.headers.items() if name.lower() not in _ROUTING),
        "body": outgoing.body,
        "output": None if output is None else [output.name, output.schema, output.is_strict],
    }
    try:
        validation = to_json(draft.validation)
    except (PydanticSerializationError, ValueError, RecursionError):
        logger.warning(
            "%s: its answer is not kept: the validation context, a %s, has no form in JSON",
            draft.name,
            type(draft.validation).__name__,
        )
        return None
    digest = hashlib.sha256(json.dumps(told, separators=(",", ":")).encode())
    digest.update(b"\0" + validation)
    return digest.hexdigest()


def _written(reply: Reply[Any]) -> bytes:
    """As JSON: an object of the program that is changed later changes nothing here."""
    answer, last = reply.answer, reply.attempts[-1]
    spent = asdict(reply.spent)
    if spent["dollars"] is not None:
        spent["dollars"] = str(spent["dollars"])
    told = {
        "message": messages_to_json([answer.message])[0],
        "ended": asdict(answer.ended),
        "usage": asdict(answer.usage),
        "began": asdict(answer.began),
        "logprobs": None if answer.logprobs is None else asdict(answer.logprobs),
        "spent": spent,
        "request_id": last.request_id,
        "raw": last.raw,
    }
    return json.dumps(told, separators=(",", ":")).encode()


def _read(draft: Draft[T], found: bytes) -> Reply[T] | None:
    from .exchange import value_of
    from .reply import Reply

    try:
        told = json.loads(found)
        answer = Answer(
            message=message_from_json(told["message"], "message"),
            ended=Ended(**told["ended"]),
            usage=Usage(**told["usage"]),
            began=Began(**told["began"]),
            logprobs=None if told["logprobs"] is None else Logprobs(**told["logprobs"]),
        )
        spent = told["spent"]
        saved = Spent(**{**spent, "dollars": None if spent["dollars"] is None else Decimal(spent["dollars"])})
        raw, request_id = list(told["raw"]), str(told["request_id"])
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as exc:
        logger.warning("%s: a kept answer cannot be read, and the call is made: %s", draft.name, type(exc).__name__)
        return None
    try:
        result = value_of(draft, answer)
    except CallFailed:
        return None
    attempt = Attempt(
        number=1, model=draft.model, why="cached", answer=answer, saved=saved, request_id=request_id, raw=raw
    )
    return Reply(draft=draft, answer=answer, attempts=(attempt,), result=cast("T", result))
