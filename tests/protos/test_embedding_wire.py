"""Orders and answers of texts come through the wire as they were; what makes no sense is refused, never guessed.

Guards: texts cut at wrong places; an answer with a part missing taken for whole; an engine's error that loses its kind.
"""

from __future__ import annotations

from array import array
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.protos import embedding
from diptych.protos import engine_pb2 as pb
from diptych.protos.embedding import (
    EmbedKind,
    EmbedOrder,
    EmbedTimes,
    TextRow,
    order_from_pb,
    order_to_pb,
    part_of_error,
    parts_of,
    values_of,
)
from diptych.protos.errors import CapacityError, EngineError, InvalidRequest, Overloaded

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


@st.composite
def texts(draw: st.DrawFn) -> TextRow:
    ids = draw(IDS)
    return TextRow(ids, draw(st.integers(0, len(ids) - 1)))


@given(st.sampled_from(EmbedKind), st.lists(texts(), min_size=2, max_size=6), st.integers(0, 9), st.integers(0, 4096))
def test_an_order_comes_through(kind: EmbedKind, rows: list[TextRow], skip: int, dimensions: int) -> None:
    order = EmbedOrder(
        kind=kind,
        rows=tuple(rows),
        skip=skip,
        dimensions=dimensions,
        deadline=12.5,
        traceparent="00-aa-bb-01",
        priority=-3,
        tenant="t",
        weight=2.5,
    )
    message = pb.EmbedOrder.FromString(order_to_pb(order, 10.0, 7).SerializeToString())
    assert message.engine_epoch == 7
    assert order_from_pb(message, 100.0) == EmbedOrder(
        kind=kind,
        rows=tuple(rows),
        skip=skip,
        dimensions=dimensions,
        deadline=102.5,
        traceparent="00-aa-bb-01",
        priority=-3,
        tenant="t",
        weight=2.5,
    )


@pytest.mark.parametrize(
    "message",
    [
        pb.EmbedOrder(token=[1], length=[1]),
        pb.EmbedOrder(kind=pb.EMBED_KIND_VECTORS),
        pb.EmbedOrder(kind=pb.EMBED_KIND_VECTORS, token=[1, 2], length=[1]),
        pb.EmbedOrder(kind=pb.EMBED_KIND_VECTORS, token=[1], length=[1, 0]),
        pb.EmbedOrder(kind=pb.EMBED_KIND_SCORES, token=[1, 2], length=[2], second=[2]),
        pb.EmbedOrder(kind=pb.EMBED_KIND_SCORES, token=[1, 2], length=[2], second=[1, 1]),
        pb.EmbedOrder(kind=pb.EMBED_KIND_SIMILARITIES, token=[1], length=[1]),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(message: pb.EmbedOrder) -> None:
    with pytest.raises(InvalidRequest):
        order_from_pb(message, 0.0)


@given(st.integers(1, 9), st.integers(1, 40))
def test_an_answer_comes_through_in_parts(width: int, count: int) -> None:
    values = array("f", range(width * count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "PART_BYTES", 64)
        parts = list(parts_of(values.tobytes(), width, EmbedTimes(0.25, 0.5)))
    rows, times = values_of([pb.EmbedPart.FromString(part.SerializeToString()) for part in parts], count)
    assert times == EmbedTimes(0.25, 0.5)
    assert [list(row) for row in rows] == [list(values[i * width : (i + 1) * width]) for i in range(count)]


def test_an_answer_that_is_not_whole_is_none() -> None:
    whole = list(parts_of(array("f", [1, 2, 3, 4]).tobytes(), 2, EmbedTimes()))
    for parts, count in (([], 2), (whole, 3), (whole * 2, 4), ([pb.EmbedPart(width=2, values=b"123")], 1)):
        with pytest.raises(EngineError):
            values_of(parts, count)
    with pytest.raises(EngineError):
        values_of([pb.EmbedPart(width=2, values=bytes(8))], 1)  # without its last part


def test_an_engines_error_keeps_its_kind_and_field() -> None:
    with pytest.raises(CapacityError, match="full"):
        values_of([part_of_error(Overloaded("full"))], 1)
    with pytest.raises(InvalidRequest) as caught:
        values_of([part_of_error(InvalidRequest("no", "dimensions"))], 1)
    assert caught.value.param == "dimensions"


class _Watched:
    """A part that counts how often its numbers are copied out of it."""

    def __init__(self, part: pb.EmbedPart) -> None:
        self._part = part
        self.copies = 0

    def __getattr__(self, name: str) -> Any:
        self.copies += name == "values"
        return getattr(self._part, name)


def test_a_parts_numbers_are_copied_once() -> None:
    """Guards against a copy of the whole part for each of its texts: an answer of 8 MiB held the router for 150 ms."""
    parts = [_Watched(part) for part in parts_of(bytes(4 * 16 * 200), 16, EmbedTimes())]
    rows, _ = values_of(cast("list[pb.EmbedPart]", parts), 200)
    assert len(rows) == 200
    assert [part.copies for part in parts] == [1] * len(parts)
