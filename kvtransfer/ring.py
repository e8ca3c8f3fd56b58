"""The staging ring's memory: a memfd with a header and a data area per slot. The owner writes, peers only read.

| header 0 | header 1 | ... | pad to a page | data 0 | data 1 | ...
header: generation, chunk, size, checksum, transfer id, attempt. The generation is a seqlock: a reader checks the header
before and the generation after its copy, and the owner raises the generation before it reuses a slot.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from dataclasses import dataclass, field

import numpy as np
import xxhash

from diptych.protos.types import TransferKey

_HEADER = struct.Struct("<IIQQ16sI")  # generation, chunk, size, checksum, transfer_id, attempt
_GENERATION = struct.Struct("<I")
HEADER_BYTES = 64
_PAGE = 4096
# Linux: no new writable mapping or write() through this file, whoever opens it again. Not named in Python 3.11.
_F_SEAL_FUTURE_WRITE = 0x0010


class TornRead(Exception):
    """The slot does not hold the announced chunk, or stopped to hold it during the copy. Never leaves this folder."""


@dataclass(frozen=True, slots=True)
class SlotRef:
    """A chunk in a slot, as announced; what a reader asks for."""

    key: TransferKey
    chunk: int
    slot: int
    generation: int
    size_bytes: int
    checksum: int
    capability: bytes = field(default=b"", compare=False, repr=False)  # the right to fetch it over a network


def checksum(data: memoryview) -> int:
    """xxh3, 64 bits, of a chunk in wire form."""
    return xxhash.xxh3_64_intdigest(data)


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE) * _PAGE


class RingView:
    """A mapping of a ring, of the owner or of a peer. Any thread may read; `close` when no read is under way."""

    def __init__(self, fd: int, num_slots: int, slot_bytes: int, *, writable: bool) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._data_at = _round_up(num_slots * HEADER_BYTES)
        self._stride = _round_up(slot_bytes)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, ring_bytes(num_slots, slot_bytes), mmap.MAP_SHARED, protection)

    def generation(self, slot: int) -> int:
        """The slot's present generation."""
        return int(_GENERATION.unpack_from(self._map, slot * HEADER_BYTES)[0])

    def read(self, ref: SlotRef, out: memoryview) -> None:
        """Copy a chunk to private memory of ref.size_bytes. Raises TornRead; `out` is then worthless.

        The checksum is the caller's to check, on `out`: the shared bytes could change after any check of theirs.
        """
        self.check(ref)
        # numpy, because it copies without the interpreter lock.
        source = np.frombuffer(self._map, np.uint8, ref.size_bytes, self._data_at + ref.slot * self._stride)
        np.copyto(np.frombuffer(out, np.uint8), source)
        if self.generation(ref.slot) != ref.generation:
            raise TornRead(f"slot {ref.slot} was reused while it was read")

    def check(self, ref: SlotRef) -> None:
        """Raise TornRead unless the slot's header says what `ref` says."""
        if not (0 <= ref.slot < self.num_slots and ref.size_bytes <= self.slot_bytes):
            raise TornRead(f"there is no slot {ref.slot} with {ref.size_bytes} bytes")
        found = self.lookup(ref.slot)
        if found != ref:
            raise TornRead(f"slot {ref.slot} holds generation {found.generation}, wanted {ref.generation} of {ref.key}")

    def lookup(self, slot: int) -> SlotRef:
        """What the slot's header says. An empty slot has size 0."""
        generation, chunk, size_bytes, digest, transfer_id, attempt = _HEADER.unpack_from(
            self._map, slot * HEADER_BYTES
        )
        return SlotRef(TransferKey(transfer_id, attempt), chunk, slot, generation, size_bytes, digest)

    def frame(self, ref: SlotRef, at: int, size_bytes: int) -> bytes:
        """A copy of bytes at .. at + size_bytes - 1 of a chunk, fewer at its end. Raises TornRead."""
        start = self._data_at + ref.slot * self._stride
        data = self._map[start + at : start + min(at + size_bytes, ref.size_bytes)]
        if self.generation(ref.slot) != ref.generation:
            raise TornRead(f"slot {ref.slot} was reused while it was read")
        return data

    def close(self) -> None:
        """Unmap. A read that is still under way keeps the mapping alive until it ends."""
        try:
            self._map.close()
        except BufferError:
            pass


def ring_bytes(num_slots: int, slot_bytes: int) -> int:
    """Size of the whole mapping."""
    return _round_up(num_slots * HEADER_BYTES) + num_slots * _round_up(slot_bytes)


class RingMemory(RingView):
    """The owner's end. One thread writes. `fd` stays open until `close`."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.fd = os.memfd_create("diptych-kv-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, ring_bytes(num_slots, slot_bytes))
        super().__init__(self.fd, num_slots, slot_bytes, writable=True)
        # A peer can neither shrink the file under our feet (SIGBUS) nor write into it.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError:
            pass  # before Linux 5.1; readers map without write permission anyway
        for slot in range(num_slots):
            self.retire(slot, 1)

    def retire(self, slot: int, generation: int) -> None:
        """Give the slot its next generation: whoever still reads the last one will notice."""
        _HEADER.pack_into(self._map, slot * HEADER_BYTES, generation, 0, 0, 0, bytes(16), 0)

    def data(self, slot: int, size_bytes: int) -> memoryview:
        """The first bytes of the slot, writable. Release it before `close`."""
        at = self._data_at + slot * self._stride
        return memoryview(self._map)[at : at + size_bytes]

    def publish(self, ref: SlotRef) -> None:
        """Write the header of a filled slot; `ref.generation` is the one it was retired to."""
        assert self.generation(ref.slot) == ref.generation
        _HEADER.pack_into(
            self._map,
            ref.slot * HEADER_BYTES,
            ref.generation,
            ref.chunk,
            ref.size_bytes,
            ref.checksum,
            ref.key.transfer_id,
            ref.key.attempt,
        )

    def close(self) -> None:
        """Unmap and close the descriptor. Idempotent."""
        super().close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
