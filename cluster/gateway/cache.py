"""Answers that were given before, for equal requests of the same tenant: in this router's memory, bounded.

gateway.py asks before anything is reserved, and hands over what was answered. Kept are whole answers that ended by
themselves and are words alone: no calls, nothing cut off, nothing that a filter took away, no failure.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

from diptych.protos.messages import Reasoning, Text
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Reply
from diptych.protos.wire_checks import compact

from .money_metrics import MoneyMetrics
from .money_settings import CacheSettings, RouteCacheSettings
from .ports import Context

_KIB: Final = 1024
# Change nothing of what is answered: how it is sent, how long it may take, whom it is counted for.
_UNASKED: Final = (
    "explain",
    "first_token_timeout_s",
    "metadata",
    "priority",
    "safety_identifier",
    "stream",
    "stream_options",
    "timeout_s",
    "user",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedRoute:
    """`targets`: all that may answer, in the order of the configuration: other ones, other answers."""

    settings: RouteCacheSettings
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Kept:
    reply: Reply
    until: float
    num_bytes: int


class ResponseCache:
    """Of one gateway."""

    def __init__(
        self,
        settings: CacheSettings,
        routes: Mapping[str, CachedRoute],
        *,
        metrics: MoneyMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routes = routes
        self._max_bytes = settings.max_mib * _KIB * _KIB
        self._max_answer = settings.max_answer_kib * _KIB
        self._metrics = metrics
        self._clock = clock
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self.num_bytes = 0

    def takes(self, request: ChatRequest, context: Context) -> bool:
        """Whether an answer to this request may be kept: the route has a cache, the client does not forbid it, and
        either the temperature is 0, or the route or the client wants it all the same.
        """
        route = self._routes.get(request.model)
        if route is None or context.cache == "no-store" or request.num_choices != 1:
            return False
        if request.logprobs or request.prompt_logprobs is not None:  # a Reply has none
            return False
        return request.temperature == 0 or route.settings.always or context.cache == "always"

    async def find(self, request: ChatRequest, context: Context) -> Reply | None:
        """The answer to an equal request of the same tenant. Its usage is what the first one used."""
        if not self.takes(request, context):
            return None
        kept = None if context.cache == "no-cache" else self._get(self._key(request, context))
        if self._metrics is not None:
            self._metrics.cache.labels("miss" if kept is None else "hit").inc()
        return kept

    async def keep(self, request: ChatRequest, context: Context, reply: Reply) -> None:
        """An answer, if it is one to be kept."""
        if not self.takes(request, context) or not _is_lasting(reply):
            return
        size = _size(reply)
        if size > self._max_answer:
            return
        until = self._clock() + self._routes[request.model].settings.ttl_s
        key = self._key(request, context)
        self._drop(key)
        self._kept[key] = _Kept(reply, until, size)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))
        self._tell()

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.num_bytes = 0
        self._tell()

    def _get(self, key: bytes) -> Reply | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if self._clock() >= kept.until:
            self._drop(key)
            self._tell()
            return None
        self._kept.move_to_end(key)
        return kept.reply

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.num_bytes -= kept.num_bytes

    def _tell(self) -> None:
        if self._metrics is not None:
            self._metrics.cache_bytes.set(self.num_bytes)

    def _key(self, request: ChatRequest, context: Context) -> bytes:
        told = {name: value for name, value in request if name not in _UNASKED and value is not None}
        said = compact(_plain([context.tenant, self._routes[request.model].targets, told]))
        return hashlib.sha256(said.encode(errors="surrogatepass")).digest()


def _is_lasting(reply: Reply) -> bool:
    parts = reply.message.parts
    return (
        reply.ended.finish == "stop"
        and any(isinstance(part, Text) and part.text for part in parts)
        and all(isinstance(part, Text | Reasoning) for part in parts)
    )


def _size(reply: Reply) -> int:
    texts = [part.text for part in reply.message.parts if isinstance(part, Text | Reasoning)]
    return sum(sys.getsizeof(text) for text in texts) + len(compact(_plain(reply))) + 1024


def _plain(value: Any) -> Any:
    """For JSON. The order of keys is kept: the members of an answer follow those of its schema. Of dataclasses all
    fields count, those too that make no difference to anybody else.
    """
    if is_dataclass(value):
        told = {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
        return [type(value).__name__, told]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
