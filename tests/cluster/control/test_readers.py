"""How far the routers have read the membership."""

from __future__ import annotations

from diptych.cluster.control.readers import Readers


def test_a_version_is_known_when_every_reader_that_still_asks_has_taken_it_in() -> None:
    now = 0.0
    readers = Readers(lambda: now, patience_s=20.0)
    assert not readers.is_behind(7), "nobody reads: nobody is waited for"
    readers.note("a", 6)
    readers.note("b", 7)
    assert readers.is_behind(7)
    readers.note("a", 7)
    assert not readers.is_behind(7)
    readers.note("a", 7)
    assert readers.is_behind(8)


def test_a_reader_that_is_gone_is_not_waited_for() -> None:
    now = 0.0
    readers = Readers(lambda: now, patience_s=20.0)
    readers.note("gone", 1)
    now = 10.0
    readers.note("here", 5)
    assert readers.is_behind(5)
    now = 21.0
    assert not readers.is_behind(5)
