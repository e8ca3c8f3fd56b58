"""Prefill and decode engine in one process: the reader uses the owner's mapping. Rings are found by engine life."""

from __future__ import annotations

from diptych.protos.errors import PeerLost
from diptych.protos.types import EngineId, EngineRef

from ..ring import RingMemory, SlotRef

_RINGS: dict[tuple[EngineId, int], RingMemory] = {}  # of the engines that live in this process


def is_here(peer: EngineRef) -> bool:
    """Whether that life of an engine has its ring in this process."""
    return (peer.engine_id, peer.epoch) in _RINGS


class LocalOwner:
    """Makes the ring of `me` findable within the process."""

    def __init__(self, ring: RingMemory, me: EngineRef) -> None:
        self._id = (me.engine_id, me.epoch)
        _RINGS[self._id] = ring

    def invite(self) -> bytes:
        """Nothing to tell: the peer looks the ring up by the engine's life."""
        return b""

    def close(self) -> None:
        """See RingOwner."""
        _RINGS.pop(self._id, None)


class LocalReader:
    """Reads the ring of `peer`. Raises PeerLost when it is not in this process."""

    inline = True

    def __init__(self, peer: EngineRef) -> None:
        self._id = (peer.engine_id, peer.epoch)
        self._closed = False
        if not is_here(peer):
            raise PeerLost(f"engine {peer.engine_id} does not live in this process")

    def read(self, ref: SlotRef, out: memoryview) -> None:
        """See RingReader."""
        ring = _RINGS.get(self._id)
        if ring is None or self._closed:
            raise PeerLost("the ring is closed")
        ring.read(ref, out)

    def close(self) -> None:
        """See RingReader."""
        self._closed = True
