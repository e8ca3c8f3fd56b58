"""The line of texts: nobody starves, a step has its bound, every request ends exactly once.

Guards: a text that two steps compute, or none; a batch that keeps a single text waiting; a tenant that takes all; a
request that is told twice, or never, after it was cancelled or late.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.engine.embed_line import EmbedLine, Outcome, Slice
from diptych.protos.embedding import EmbedKind, EmbedOrder, TextRow
from diptych.protos.errors import Cancelled, DeadlineExceeded, DiptychError, Overloaded, ShuttingDown
from diptych.protos.testing import FakeClock


def order(*lengths: int, tenant: str = "", priority: int = 0, weight: float = 1.0, **more: object) -> EmbedOrder:
    rows = tuple(TextRow([1] * length) for length in lengths)
    fields = {"kind": EmbedKind.VECTORS, "rows": rows, "tenant": tenant, "priority": priority, "weight": weight}
    return EmbedOrder(**(fields | more))  # type: ignore[arg-type]


def line(*, max_waiting: int = 100, step_tokens: int = 16, clock: FakeClock | None = None) -> EmbedLine:
    return EmbedLine(max_waiting=max_waiting, step_tokens=step_tokens, clock=clock or FakeClock())


def computed(part: Slice) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The length of each text as its number."""
    return np.asarray([[len(row.ids)] for row in part.rows], dtype=np.float32)


def drain(one: EmbedLine) -> int:
    """Compute all; gives the number of steps."""
    steps = 0
    while parts := one.take(0.0):
        steps += 1
        for part in parts:
            one.finish(part, computed(part))
    return steps


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.sampled_from("abc"), st.integers(-1, 1)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 24),
)
def test_every_text_is_computed_once_in_steps_within_their_bound(
    jobs: list[tuple[list[int], str, int]], step_tokens: int
) -> None:
    one, told = line(step_tokens=step_tokens), list[tuple[int, Outcome]]()
    for number, (lengths, tenant, priority) in enumerate(jobs):
        one.put(order(*lengths, tenant=tenant, priority=priority), lambda o, number=number: told.append((number, o)))
    while parts := one.take(0.0):
        sizes = [len(row.ids) for part in parts for row in part.rows]
        assert sum(sizes) <= step_tokens or len(sizes) == 1
        assert len({part.job for part in parts}) == len(parts)
        for part in parts:
            one.finish(part, computed(part))
    assert sorted(number for number, _ in told) == list(range(len(jobs)))
    for number, outcome in told:
        assert not isinstance(outcome, DiptychError)
        assert outcome[0][:, 0].tolist() == jobs[number][0]
    assert (one.num_jobs, one.queued_tokens) == (0, 0)


def test_a_single_text_waits_for_no_batch() -> None:
    one, told = line(), list[str]()
    one.put(order(*[4] * 100), lambda _: told.append("batch"))
    one.take(0.0)
    one.put(order(4), lambda _: told.append("single"))
    _, single = sorted(one.take(0.0), key=lambda part: -len(part.texts))
    assert len(single.texts) == 1
    one.finish(single, computed(single))
    assert told == ["single"]


def test_priorities_come_first_and_tenants_share_by_weight() -> None:
    one = line(step_tokens=12)
    one.put(order(*[4] * 50, tenant="many"), lambda _: None)
    one.put(order(*[4] * 50, tenant="many"), lambda _: None)
    one.put(order(*[4] * 50, tenant="heavy", weight=2.0), lambda _: None)
    served = {"many": 0, "heavy": 0}
    for _ in range(15):
        for part in one.take(0.0):
            served[part.job.order.tenant] += len(part.texts)
            one.finish(part, computed(part))
    assert 1.5 < served["heavy"] / served["many"] < 2.5
    one.put(order(*[4] * 3, priority=-1, tenant="many"), lambda _: None)
    assert [part.job.order.priority for part in one.take(0.0)] == [-1]


def test_a_long_text_is_not_passed_by_short_ones_for_ever() -> None:
    one, told = line(step_tokens=8), list[str]()
    one.put(order(20), lambda _: told.append("long"))
    for _ in range(5):
        one.put(order(1), lambda _: told.append("short"))
    drain(one)
    assert told[0] == "long"


def test_one_more_than_the_bound_is_refused_and_so_is_one_of_a_line_that_goes() -> None:
    one = line(max_waiting=2)
    jobs = [one.put(order(1), lambda _: None) for _ in range(2)]
    with pytest.raises(Overloaded):
        one.put(order(1), lambda _: None)
    one.cancel(jobs[0])
    one.put(order(1), lambda _: None)
    one.is_draining = True
    with pytest.raises(ShuttingDown):
        one.put(order(1), lambda _: None)
    one.close()
    assert one.take(None) == []


def test_who_is_cancelled_is_told_once_and_computed_no_further() -> None:
    one, told = line(step_tokens=4), list[Outcome]()
    job = one.put(order(4, 4, 4), told.append)
    (part,) = one.take(0.0)
    one.cancel(job)
    one.cancel(job)
    one.finish(part, computed(part))
    assert one.take(0.0) == []
    assert [type(outcome) for outcome in told] == [Cancelled]


def test_who_is_late_is_told_so() -> None:
    clock = FakeClock()
    one, told = line(clock=clock), list[Outcome]()
    one.put(order(4, deadline=clock() + 1), told.append)
    clock.advance(2)
    assert one.take(0.0) == []
    assert [type(outcome) for outcome in told] == [DeadlineExceeded]
    with pytest.raises(DeadlineExceeded):
        one.put(order(4, deadline=clock() - 1), told.append)


def test_similarities_are_cosines_with_the_first_text() -> None:
    one, told = line(), list[Outcome]()
    one.put(order(1, 2, 3, kind=EmbedKind.SIMILARITIES), told.append)
    vectors = {1: [2.0, 0.0], 2: [3.0, 0.0], 3: [0.0, 5.0]}
    for part in one.take(0.0):
        one.finish(part, np.asarray([vectors[len(row.ids)] for row in part.rows], dtype=np.float32))
    (outcome,) = told
    assert not isinstance(outcome, DiptychError)
    np.testing.assert_allclose(outcome[0], [[1.0], [0.0]], atol=1e-6)
