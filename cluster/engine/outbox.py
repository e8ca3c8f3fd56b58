"""The seam between step thread and asyncio: a bounded ring of step outputs, and room for one change of block names. The
step thread only appends and, when the reader sleeps, wakes it; protobuf and routing happen on the other side.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from diptych.kvtransfer.prefix import NameChange
from diptych.protos.types import Role, StepOutput


class Outbox:
    """One writer (step thread), one reader (the event loop that `attach` names)."""

    def __init__(self, max_outputs: int) -> None:
        self._ring: deque[tuple[Role, StepOutput]] = deque()
        self._max_outputs = max_outputs
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_ready: Callable[[], None] | None = None
        self._awake = False
        self._lost_before = 0  # of outputs_lost, told by `drain`
        self._names: NameChange | None = None
        self.outputs_lost = 0

    def attach(self, loop: asyncio.AbstractEventLoop, on_ready: Callable[[], None]) -> None:
        """`on_ready` runs on `loop` when there is something to drain. Call before the first `put`."""
        self._loop = loop
        self._on_ready = on_ready

    def put(self, role: Role, output: StepOutput) -> None:
        """Never blocks. When the reader is `max_outputs` behind, the tokens are lost and `drain` says so.

        Terminal events are kept: they end the books of their requests and are no more than these.
        """
        if len(self._ring) >= self._max_outputs:
            self.outputs_lost += 1
            output = StepOutput(finishes=output.finishes)
        if output:
            self._ring.append((role, output))
        if not self._awake and self._loop is not None and self._on_ready is not None:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._on_ready)
            except RuntimeError:  # the event loop is closed: the engine is shutting down and nobody reads any more
                self._ring.clear()

    def drain(self) -> tuple[list[tuple[Role, StepOutput]], bool]:
        """All outputs in order, and whether some were lost since the last call."""
        # Cleared first: an output that comes after the ring was emptied must wake the reader again.
        self._awake = False
        outputs = []
        while self._ring:
            outputs.append(self._ring.popleft())
        total = self.outputs_lost  # read once: the step thread goes on counting
        lost, self._lost_before = total > self._lost_before, total
        return outputs, lost

    @property
    def takes_names(self) -> bool:
        """Whether the last change of block names was taken: until then the pool's journal sums up what follows."""
        return self._names is None

    def put_names(self, change: NameChange) -> None:
        """From the step thread, while `takes_names`. Wakes nobody: names can wait for the reader's next status."""
        assert self._names is None
        self._names = change

    def take_names(self) -> NameChange | None:
        """The change that lies here, or None."""
        change, self._names = self._names, None
        return change
