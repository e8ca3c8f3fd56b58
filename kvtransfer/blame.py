"""Which transports are not to be trusted any more, because what came over them was altered again and again. Pure."""

from __future__ import annotations

from diptych.protos.types import EngineId, EngineRef

from .messages import Link

_ALTERED = 3  # chunks of one pair
_WITHIN_S = 60.0


class Blame:
    """Counts altered chunks by pair. A transport is blamed once in the life of an engine: where there is no other, it
    is used again, and the checksums go on guarding it.
    """

    def __init__(self) -> None:
        self._altered_at: dict[Link, list[float]] = {}
        self._blamed: dict[EngineId, tuple[int, frozenset[str]]] = {}  # of the engine's last life that was blamed

    def altered(self, link: Link, transport: str, now: float) -> bool:
        """A chunk came altered. True: the transport is blamed with this, and the pair is to be formed without it."""
        recent = [at for at in self._altered_at.get(link, ()) if now - at < _WITHIN_S] + [now]
        self._altered_at[link] = recent
        blamed = self._of(link.engine_id, link.epoch)
        if len(recent) < _ALTERED or transport in blamed:
            return False
        self._blamed[link.engine_id] = (link.epoch, blamed | {transport})
        return True

    def end(self, link: Link) -> None:
        """The pair is down."""
        self._altered_at.pop(link, None)

    def of(self, peer: EngineRef) -> tuple[str, ...]:
        """The transports blamed in that life of an engine, sorted."""
        return tuple(sorted(self._of(peer.engine_id, peer.epoch)))

    def _of(self, engine_id: EngineId, epoch: int) -> frozenset[str]:
        life, blamed = self._blamed.get(engine_id, (epoch, frozenset[str]()))
        return blamed if life == epoch else frozenset()
