"""The start-up's account: every second between the command and `ready` belongs to a named stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

BAR_WIDTH = 24


class Timeline:
    """Stages in order; what lies between two stages goes to `other`."""

    def __init__(self, began: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._began = began
        self._say = say
        self._clock = clock
        self._stages: list[tuple[str, float, tuple[str, ...]]] = []

    def add(self, name: str, seconds: float, notes: Sequence[str] = ()) -> None:
        """A stage that was measured elsewhere."""
        self._stages.append((name, seconds, tuple(notes)))

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Measure a stage and say so at its begin; append to the list what its seconds went to."""
        self._say(f"  {name} ...")
        began = self._clock()
        notes: list[str] = []
        yield notes
        self.add(name, self._clock() - began, notes)

    def table(self) -> str:
        """All stages with their share; the seconds add up to the time since the beginning."""
        total = self._clock() - self._began
        other = total - sum(seconds for _, seconds, _ in self._stages)
        lines = []
        for name, seconds, notes in [*self._stages, ("other", max(other, 0.0), ())]:
            bar = "#" * round(BAR_WIDTH * seconds / total) if total > 0 else ""
            lines.append(f"  {name:<16}{seconds:>7.2f} s  {bar}")
            lines += [f"      {note}" for note in notes]
        lines.append(f"  {'ready after':<16}{total:>7.2f} s")
        return "\n".join(lines)
