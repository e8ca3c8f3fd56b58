"""Python's cycle collector in a process of engines: a long pass of it is a pause of every answer, since it stops all
threads. Seldom passes over few objects, and those counted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from diptych.protos.ports import Clock

# Containers that came and did not go between two passes over the young ones. A pass over 50,000 took 7 ms on
# a busy core; by default there is one every 700, and one over all that the process holds every 70,000.
_YOUNG, _MIDDLE, _OLD = 50_000, 20, 100


def settle() -> Callable[[], None]:
    """Whatever the process holds now stays: model, pools and modules are looked through no more. Once, when its engine
    is warm; a process that drops its engines and goes on calls what this returns, and all is as before.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)

    def undo() -> None:
        gc.unfreeze()
        gc.set_threshold(*before)

    return undo


class Pauses:
    """Counts the collector's passes in this process from `watch` to `end`, and the seconds that they took."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = 0.0
        self.passes = 0
        self.seconds = 0.0

    def watch(self) -> None:
        """Be called by the collector."""
        gc.callbacks.append(self._note)

    def end(self) -> None:
        """No more. Repeating it does nothing."""
        if self._note in gc.callbacks:
            gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._began = self._clock()
        else:
            self.passes += 1
            self.seconds += self._clock() - self._began
