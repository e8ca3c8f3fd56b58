"""Whether the engines at the other ends of the pairs are still there. Pure; each machine keeps one.

A stopped process keeps its sockets open and its kernel answers for it, so only words of its own count as life.
"""

from __future__ import annotations

from diptych.protos.settings import TransferSettings

from .messages import Link

TICK_S = 0.1  # how often a driver ticks its machine while a pair is up


class Pulse:
    """When each pair was heard last. `beat_s` is the time between two heartbeats: two answers fit into every limit."""

    def __init__(self, settings: TransferSettings) -> None:
        self.beat_s = min(settings.heartbeat_s, settings.silence_s / 2.4, settings.stall_s / 3, settings.lease_s / 3)
        self._silence_s = settings.silence_s
        self._heard_at: dict[Link, float] = {}
        self._beat_at: dict[Link, float] = {}
        self._ticked_at: float | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is nobody to listen to."""
        return not self._heard_at

    def begin(self, link: Link, now: float) -> None:
        """The pair is up; that it is, counts as a sign of life."""
        self._heard_at[link] = self._beat_at[link] = now

    def end(self, link: Link) -> None:
        """The pair is down."""
        self._heard_at.pop(link, None)
        self._beat_at.pop(link, None)

    def heard(self, link: Link, at: float) -> None:
        """The peer said something at that time; of a pair that is down it does not count."""
        if link in self._heard_at:
            self._heard_at[link] = max(at, self._heard_at[link])

    def tick(self, now: float) -> list[Link]:
        """The pairs whose peer has been silent for too long.

        A tick that comes late tells that this process did not run: what it did not hear meanwhile is nobody's fault,
        and the time is not counted.
        """
        late = 0.0 if self._ticked_at is None else max(0.0, now - self._ticked_at - TICK_S)
        self._ticked_at = now
        for link, at in self._heard_at.items():
            self._heard_at[link] = max(at, min(now, at + late))
        return [link for link, at in self._heard_at.items() if now - at >= self._silence_s]

    def due(self, now: float) -> list[Link]:
        """The pairs that are to be sent a heartbeat now; they count as sent."""
        due = [link for link, at in self._beat_at.items() if now - at >= self.beat_s]
        for link in due:
            self._beat_at[link] = now
        return due
