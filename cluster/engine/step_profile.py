"""A trace of a few steps in the middle of a batch: what ran on the device, or, without one, in the step thread.

Driven by TimedRunner from the step thread, since torch's profiler sees the thread that started it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Piece(NamedTuple):
    """A kernel, a copy or an op. Microseconds; `own_us` without what it called."""

    name: str
    begin_us: float
    end_us: float
    own_us: float


class StepProfile:
    """Traces `count` steps, `first` (from 0) the first of them. Steps before and after are waited for, so that they are
    no part of it.
    """

    def __init__(self, *, first: int, count: int, on_card: bool, on_end: Callable[[], None]) -> None:
        """`on_end` is called from the step thread once the steps were traced."""
        assert count >= 1
        self.num_steps = 0  # traced; complete when the batch is over
        self._first, self._end = first, first + count
        self._on_card = on_card
        self._on_end = on_end
        self._launched = 0
        self._collected = 0
        self._profiler: Any = None
        self._is_on = False

    def warm_up(self) -> None:
        """Before the batch, in the thread that imported torch: the tracer wants to begin its life there, and the first
        trace of a process takes a second to begin.
        """
        profiler = self._new()
        profiler.start()
        profiler.stop()

    def before_launch(self) -> None:
        """Of every step."""
        if self._launched == self._first:
            self._settle()
            self._profiler = self._new()
            self._profiler.start()
            self._is_on = True
        elif self._launched == self._end:
            self.close()
        self._launched += 1
        self.num_steps += self._is_on

    def after_collect(self) -> None:
        """Of every step."""
        self._collected += 1
        if self._collected == self._end:
            self.close()

    def close(self) -> None:
        """End the trace, if it is under way: in the thread that steps."""
        if self._is_on:
            self._settle()
            self._is_on = False
            self._profiler.stop()
            self._on_end()

    def pieces(self) -> list[Piece]:
        """What ran. Empty where the batch had no step number `first`."""
        if self._profiler is None:
            return []
        found = []
        for event in self._profiler.events():
            on_card = event.device_type.name != "CPU"
            if on_card != self._on_card or getattr(event, "is_user_annotation", False):
                continue
            begin, end = event.time_range.start, event.time_range.end
            own = end - begin if on_card else event.self_cpu_time_total
            found.append(Piece(event.name, begin, end, own))
        return found

    def _new(self) -> Any:
        activity = torch.profiler.ProfilerActivity
        on = activity.CUDA if self._on_card else activity.CPU
        return torch.profiler.profile(
            activities=[on], acc_events=True
        )  # without that it warns of cycles, which we lack

    def _settle(self) -> None:
        if self._on_card:
            torch.cuda.synchronize()
