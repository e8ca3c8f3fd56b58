"""Texts to numbers between a router and an engine of the role embed: the order, the answer, and both on the wire.

Texts are token ids here; what they were is the API's business. Numbers are float32.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from . import engine_pb2 as pb
from .errors import DiptychError, EngineError, InvalidRequest, error_from_code, param_of

PART_BYTES = 1 << 20  # of values in one part of an answer


class EmbedKind(StrEnum):
    """What an order wants of its texts."""

    VECTORS = "vectors"  # one of each text
    SIMILARITIES = "similarities"  # cosine of the first text with each of the others
    SCORES = "scores"  # of each text, which is a pair, by the model's own head


_KINDS = {
    EmbedKind.VECTORS: pb.EMBED_KIND_VECTORS,
    EmbedKind.SIMILARITIES: pb.EMBED_KIND_SIMILARITIES,
    EmbedKind.SCORES: pb.EMBED_KIND_SCORES,
}
_OF_KIND = {number: kind for kind, number in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class TextRow:
    """One text in token ids, at least one. `second`: where the second text of a pair begins; 0: it is none."""

    ids: Sequence[int]
    second: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOrder:
    """One request as an engine gets it. `skip` tokens at the front of each text take no part in pooling; of vectors
    the first `dimensions` numbers are given, 0 means all.
    """

    kind: EmbedKind
    rows: tuple[TextRow, ...]
    skip: int = 0
    dimensions: int = 0
    deadline: float | None = None  # on the receiving process's monotonic clock, seconds
    traceparent: str = ""
    priority: int = 0  # lower is sooner
    tenant: str = ""
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Of all texts."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class EmbedTimes:
    """Seconds on the engine: until the first step with a text of the order, and from there to the last one's end."""

    queue: float = 0.0
    compute: float = 0.0


def order_to_pb(order: EmbedOrder, now: float, epoch: int) -> pb.EmbedOrder:
    """For the life `epoch` of an engine. A deadline that has passed leaves a moment, so that the engine refuses it."""
    has_seconds = any(row.second for row in order.rows)
    message = pb.EmbedOrder(
        engine_epoch=epoch,
        kind=_KINDS[order.kind],
        length=[len(row.ids) for row in order.rows],
        second=[row.second for row in order.rows] if has_seconds else (),
        skip=order.skip,
        dimensions=order.dimensions,
        timeout_s=0.0 if order.deadline is None else max(order.deadline - now, 1e-6),
        traceparent=order.traceparent,
        priority=order.priority,
        tenant=order.tenant,
        weight=order.weight,
    )
    for row in order.rows:
        message.token.extend(row.ids)
    return message


def order_from_pb(message: pb.EmbedOrder, now: float) -> EmbedOrder:
    """Raises InvalidRequest for an order that makes no sense."""
    kind = _OF_KIND.get(message.kind)
    lengths, seconds = list(message.length), list(message.second) or [0] * len(message.length)
    if kind is None:
        raise InvalidRequest(f"the order is of kind {message.kind}, which is none", "kind")
    if not lengths or min(lengths) < 1 or sum(lengths) != len(message.token) or len(seconds) != len(lengths):
        raise InvalidRequest("the lengths of the order's texts do not fit its tokens", "length")
    if any(second >= length for second, length in zip(seconds, lengths, strict=True)):
        raise InvalidRequest("a pair's second text begins behind its end", "second")
    if kind is EmbedKind.SIMILARITIES and len(lengths) < 2:
        raise InvalidRequest("similarities need two texts or more", "length")
    tokens, rows, begin = list(message.token), [], 0
    for length, second in zip(lengths, seconds, strict=True):
        rows.append(TextRow(tokens[begin : begin + length], second))
        begin += length
    return EmbedOrder(
        kind=kind,
        rows=tuple(rows),
        skip=message.skip,
        dimensions=message.dimensions,
        deadline=now + message.timeout_s if message.timeout_s else None,
        traceparent=message.traceparent,
        priority=message.priority,
        tenant=message.tenant,
        weight=message.weight or 1.0,
    )


def parts_of(values: bytes | memoryview, width: int, times: EmbedTimes) -> Iterator[pb.EmbedPart]:
    """An answer in parts of whole texts. `values`: little-endian float32."""
    size = max(PART_BYTES // (4 * width), 1) * 4 * width
    for begin in range(0, len(values), size):
        piece = bytes(values[begin : begin + size])
        is_last = begin + size >= len(values)
        told = pb.EmbedTimes(queue=times.queue, compute=times.compute) if is_last else None
        yield pb.EmbedPart(width=width, values=piece, times=told)


def part_of_error(error: DiptychError) -> pb.EmbedPart:
    """The one part of an answer that there is none."""
    told = pb.Error(code=error.code, message=error.message, retryable=error.retryable, param=param_of(error))
    return pb.EmbedPart(error=told)


def values_of(parts: Iterable[pb.EmbedPart], num_values: int) -> tuple[list[array[float]], EmbedTimes]:
    """The numbers of each text. Raises the engine's error, and EngineError for parts that make no whole answer."""
    found: list[array[float]] = []
    times: EmbedTimes | None = None
    width = 0
    for part in parts:
        if part.HasField("error"):
            raise error_from_code(part.error.code, part.error.message, part.error.param)
        width, data = width or part.width, part.values  # each look at a message's bytes copies them
        if times is not None or part.width != width or not width or len(data) % (4 * width):
            raise EngineError("the engine sent a part of an answer that makes no sense")
        for begin in range(0, len(data), 4 * width):
            row = array("f", data[begin : begin + 4 * width])
            if sys.byteorder == "big":
                row.byteswap()
            found.append(row)
        if part.HasField("times"):
            times = EmbedTimes(part.times.queue, part.times.compute)
    if times is None or len(found) != num_values:
        raise EngineError(f"the engine answered {len(found)} of {num_values} texts")
    return found, times
