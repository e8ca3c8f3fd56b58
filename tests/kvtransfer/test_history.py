"""What a machine remembers of ended transfers, and what it must not keep alive."""

from __future__ import annotations

import gc
import weakref

from diptych.kvtransfer.history import Ended, History
from diptych.protos.errors import EngineFault
from diptych.protos.types import TransferKey

KEY = TransferKey(bytes(16))


class Tensor:
    pass


def end_with_a_failed_step(history: History) -> weakref.ref[Tensor]:
    tensor = Tensor()
    try:
        raise EngineFault("the step raised")
    except EngineFault as fault:
        history.end(KEY, Ended(fault))
    return weakref.ref(tensor)


def test_the_error_of_an_ended_transfer_keeps_no_tensors_of_its_step_alive() -> None:
    history = History()
    tensor = end_with_a_failed_step(history)
    gc.collect()
    assert tensor() is None
    ended = history.find(KEY)
    assert ended is not None
    assert isinstance(ended.error, EngineFault)
    assert str(ended.error) == "the step raised"
