"""What a machine remembers of ended transfers, and what it must not keep alive."""

from __future__ import annotations

import gc
import weakref

import pytest

from diptych.kvtransfer import history as history_module
from diptych.kvtransfer.history import Ended, History
from diptych.protos.errors import Cancelled, EngineFault
from diptych.protos.types import TransferKey

KEY = TransferKey(bytes(16))


class Tensor:
    pass


def end_with_a_failed_step(history: History) -> weakref.ref[Tensor]:
    tensor = Tensor()
    try:
        raise EngineFault("the step raised")
    except EngineFault as fault:
        history.end(KEY, Ended(fault), 0.0)
    return weakref.ref(tensor)


def test_the_error_of_an_ended_transfer_keeps_no_tensors_of_its_step_alive() -> None:
    history = History(keep_s=10)
    tensor = end_with_a_failed_step(history)
    gc.collect()
    assert tensor() is None
    ended = history.find(KEY)
    assert ended is not None
    assert isinstance(ended.error, EngineFault)
    assert str(ended.error) == "the step raised"


def numbered(number: int, attempt: int = 0) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"), attempt)


def test_the_first_word_of_an_end_stands_for_the_whole_time_however_many_end_meanwhile() -> None:
    history = History(keep_s=40)
    history.end(KEY, Ended(Cancelled("first")), 0.0)
    history.end(KEY, Ended(), 0.0)
    for number in range(1, 20_001):  # 500 a second
        history.end(numbered(number), Ended(), number / 500)
    ended = history.find(KEY)
    assert ended is not None
    assert str(ended.error) == "first"
    history.end(numbered(30_000), Ended(), 40.1)
    assert history.find(KEY) is None
    assert history.find(numbered(20_000)) is not None


def test_asking_whether_an_attempt_is_stale_makes_no_other_attempt_stale() -> None:
    history = History(keep_s=10)
    assert not history.is_stale(numbered(1, 5))
    assert not history.is_stale(numbered(1, 2))
    history.note(numbered(1, 2), 0.0)
    assert not history.is_stale(numbered(1, 5))
    assert history.is_stale(numbered(1, 1))
    history.note(numbered(1, 1), 0.0)  # a late word of an older one
    assert history.is_stale(numbered(1, 1))
    assert not history.is_stale(numbered(1, 2))


def test_an_attempt_that_is_spoken_of_is_kept() -> None:
    history = History(keep_s=10)
    for second in range(0, 50, 5):
        history.note(numbered(1, 3), float(second))
        history.note(numbered(1000 + second), float(second))
    assert history.is_stale(numbered(1, 2))
    assert len(history._newest) == 4


def test_a_peer_that_goes_mad_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_MOST", 8)
    history = History(keep_s=10)
    for number in range(100):
        history.end(numbered(number), Ended(), 0.0)
        history.note(numbered(number), 0.0)
    assert len(history._ended) == len(history._newest) == 8
    assert history.find(numbered(99)) is not None
