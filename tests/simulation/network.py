"""What lies between the processes of a simulated cluster: streams that take time, stand still and break.

A stream is ordered and reliable, or broken, as TCP is. The hinge's messages get rougher weather on top while a `burst`
lasts: each is called idempotent, so single ones are lost, doubled and overtaken. Nothing here knows what a frame means.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from loop import SimLoop

NEVER = 1e9  # seconds: later than the end of any run
STEP_S = 1e-9  # between two frames of a stream: timers of the same moment fire in any order


@dataclass(slots=True)
class Burst:
    """Rough weather for single messages until `until`."""

    until: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0
    late: float = 0.0  # overtaken by others


class Network:
    """Travel times and partitions between named processes; one direction at a time."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.burst = Burst()
        self._cut: dict[tuple[str, str], float] = {}
        self._is_silent = False

    def cut(self, one: str, other: str, until: float) -> None:
        """Nothing from `one` reaches `other` before `until`; it is sent again then, as TCP does."""
        self._cut[one, other] = max(until, self._cut.get((one, other), 0.0))

    def silence(self) -> None:
        """No message arrives from now on, and nobody is told."""
        self._is_silent = True

    def arrival(self, one: str, other: str) -> float:
        """When something sent now arrives."""
        if self._is_silent:
            return NEVER
        now = self.loop.time()
        draw = self.rng.random()
        travel = 0.0002 + 0.02 * draw * draw * draw * draw
        healed = self._cut.get((one, other), 0.0)
        return (healed if healed > now else now) + travel

    @property
    def is_silent(self) -> bool:
        return self._is_silent


class End:
    """One process's end of a stream. `post` runs a job in that process: later while it is stopped, never once it died.

    `on_frame` gets what the other end sends; `on_break` is called once when the other end closes first.
    """

    def __init__(self, network: Network, name: str, post: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self.is_open = True
        self.on_frame: Callable[[object], None] = lambda frame: None
        self.on_break: Callable[[], None] = lambda: None
        self.peer: End
        self._network = network
        self._post = post
        self._last = 0.0  # arrival of what was sent last

    def send(self, frame: object) -> None:
        if self.is_open:
            self._last = max(self._last + STEP_S, self._network.arrival(self.name, self.peer.name))
            self._deliver(self._last, frame)

    def close(self) -> None:
        """The other end hears of it when what was sent before has arrived."""
        if self.is_open:
            self.is_open = False
            self._last = max(self._last + STEP_S, self._network.arrival(self.name, self.peer.name))
            if self._last < NEVER:
                self._network.loop.call_at(self._last, self.peer._post, self.peer._broken)

    def _deliver(self, at: float, frame: object) -> None:
        if at < NEVER:
            self._network.loop.call_at(at, self.peer._post, lambda: self.peer._arrive(frame))

    def _arrive(self, frame: object) -> None:
        if self.is_open:
            self.on_frame(frame)

    def _broken(self) -> None:
        if self.is_open:
            self.is_open = False
            self.on_break()


class HingeEnd(End):
    """What was on its way when the channel broke still arrives, some of it late: the machines must fence it."""

    def send(self, frame: object) -> None:
        burst, rng = self._network.burst, self._network.rng
        if isinstance(frame, str) or not self.is_open or self._network.loop.time() >= burst.until:
            super().send(frame)  # words of the handshake are no messages
            return
        if rng.random() < burst.drop:
            return
        for _ in range(1 + (rng.random() < burst.duplicate)):
            if rng.random() < burst.late:
                self._deliver(self._network.arrival(self.name, self.peer.name) + 0.1 * rng.random(), frame)
            else:
                super().send(frame)

    def _arrive(self, frame: object) -> None:
        if self.is_open:
            self.on_frame(frame)
        else:
            late = 2.0 * self._network.rng.random() ** 3
            self._network.loop.call_later(late, self._post, lambda: self.on_frame(frame))


def stream(one: End, other: End) -> None:
    """Join two ends."""
    one.peer, other.peer = other, one
