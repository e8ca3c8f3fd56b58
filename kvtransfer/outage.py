"""Which prefill engines cannot be reached: their transfers fail at once, and they are dialed again behind the scenes.

Pure; the receiver machine keeps one. Without it every request would wait for its own dial to end in vain.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.protos.errors import DiptychError
from diptych.protos.types import EngineId, EngineRef

_FIRST_PAUSE_S = 0.25  # after the first dial that failed; each later pause is twice as long
_LAST_PAUSE_S = 4.0  # with a dial's own time this is how late a healed link is noticed
_FORGET_S = 30.0  # nobody asks for the engine any more: it has been replaced, or the router avoids it


@dataclass(slots=True)
class _Outage:
    peer: EngineRef
    error: DiptychError  # of the last dial
    asked_at: float
    dial_at: float
    pause_s: float


class Outages:
    """One entry for each life of an engine whose last dial failed, until one succeeds or nobody asks for 30 s."""

    def __init__(self) -> None:
        self._known: dict[tuple[EngineId, int], _Outage] = {}

    def __len__(self) -> int:
        return len(self._known)

    def failed(self, peer: EngineRef, error: DiptychError, now: float) -> None:
        """A dial ended in vain."""
        life = (peer.engine_id, peer.epoch)
        known = self._known.get(life)
        pause_s = _FIRST_PAUSE_S if known is None else min(2 * known.pause_s, _LAST_PAUSE_S)
        asked_at = now if known is None else known.asked_at
        self._known[life] = _Outage(peer, error, asked_at, now + pause_s, pause_s)

    def reached(self, engine_id: EngineId, epoch: int) -> None:
        """A pair with that life of the engine is up: it and older ones are no matter any more."""
        self._known = {life: o for life, o in self._known.items() if life[0] != engine_id or life[1] > epoch}

    def why(self, peer: EngineRef, now: float) -> DiptychError | None:
        """Why a transfer from `peer` fails now, or None where a dial is worth its time. Counts as asking for it."""
        known = self._known.get((peer.engine_id, peer.epoch))
        if known is None:
            return None
        known.asked_at = now
        return known.error

    def due(self, now: float) -> list[EngineRef]:
        """The engines to be dialed now. Each has its next turn after the dial has failed."""
        self._known = {life: o for life, o in self._known.items() if now - o.asked_at <= _FORGET_S}
        due = [outage for outage in self._known.values() if now >= outage.dial_at]
        for outage in due:
            outage.dial_at = float("inf")
        return [outage.peer for outage in due]
