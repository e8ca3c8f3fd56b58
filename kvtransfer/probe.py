"""Whether a transport brings the right bytes, and how fast: each pair reads a slot of known bytes before it is used.

The prefill engine keeps them in the last slot of its ring, which no transfer ever takes.
"""

from __future__ import annotations

import random
import time

from diptych.protos.errors import PeerLost
from diptych.protos.types import TransferKey

from .ring import RingMemory, SlotRef, TornRead, checksum
from .transports.base import RingReader

KEY = TransferKey(b"diptych's probe.")  # names no transfer: those are minted at random
_GENERATION = 1
_SIZE_BYTES = 256 * 1024
_LEAST_READS, _MOST_READS = 3, 8
_PATIENCE_S = 0.3


def stage(ring: RingMemory, epoch: int) -> None:
    """Put the bytes of this life of the engine into the last slot."""
    ref = reference(epoch, ring.num_slots, ring.slot_bytes)
    with ring.data(ref.slot, ref.size_bytes) as data:
        data[:] = _known(epoch, ref.size_bytes)
    ring.publish(ref)


def reference(epoch: int, num_slots: int, slot_bytes: int, capability: bytes = b"") -> SlotRef:
    """What a peer of that life of the engine is to find."""
    size_bytes = min(_SIZE_BYTES, slot_bytes)
    digest = checksum(memoryview(_known(epoch, size_bytes)))
    return SlotRef(KEY, 0, num_slots - 1, _GENERATION, size_bytes, digest, capability)


def measure(reader: RingReader, ref: SlotRef, enough_mib_s: float) -> float:
    """The best speed of a few reads in MiB/s; more of them while it is below `enough_mib_s`, as this process may have
    been kept waiting. Blocks for eight reads at most, and begins none after 0.3 s. Raises PeerLost when other bytes
    came, or none.
    """
    buffer = bytearray(ref.size_bytes)
    best = 0.0
    begun_at = time.perf_counter()
    for count in range(_MOST_READS):
        started_at = time.perf_counter()
        if count >= _LEAST_READS and (best >= enough_mib_s or started_at - begun_at > _PATIENCE_S):
            break
        with memoryview(buffer) as data:
            try:
                reader.read(ref, data)
            except TornRead as exc:
                raise PeerLost("the known bytes are not where they should be", detail=str(exc)) from exc
            seconds = time.perf_counter() - started_at
            if checksum(data) != ref.checksum:
                raise PeerLost("the known bytes arrived altered")
        best = max(best, ref.size_bytes / 2**20 / max(seconds, 1e-9))
    return best


def _known(epoch: int, size_bytes: int) -> bytes:
    return random.Random(epoch).randbytes(size_bytes)
