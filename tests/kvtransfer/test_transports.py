"""Every transport through the one conformance suite; then what is particular to each."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from diptych.kvtransfer.ring import RingMemory, RingView, SlotRef, TornRead
from diptych.kvtransfer.testing import check_transport, publish
from diptych.kvtransfer.transports.base import RingReader
from diptych.kvtransfer.transports.grpc import GrpcOwner, GrpcReader
from diptych.kvtransfer.transports.local import LocalOwner, LocalReader
from diptych.kvtransfer.transports.shm import ShmOwner, ShmReader
from diptych.protos import kv_pb2 as pb
from diptych.protos import kv_pb2_grpc
from diptych.protos.channels import KV_SERVICE, listen, make_server
from diptych.protos.errors import PeerLost, StartupError
from diptych.protos.trust import Refusals, Trust
from diptych.protos.types import EngineId, EngineRef, TransferKey

TRUST = Trust.alone("decode")


class Announced:
    """A reader that was told of a slot by its owner, as ChunkReady tells it."""

    inline = False

    def __init__(self, owner: GrpcOwner, reader: GrpcReader) -> None:
        self._owner = owner
        self._reader = reader
        self.close = reader.close

    def read(self, ref: SlotRef, out: memoryview) -> None:
        capability = self._owner.capability(ref.key, ref.slot, ref.generation)
        self._reader.read(replace(ref, capability=capability), out)


@contextmanager
def serving(owner: GrpcOwner, me: EngineRef) -> Iterator[None]:
    """A gRPC server with nothing but FetchBytes, on a loop of its own."""
    started = threading.Event()
    stopping = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    class Service(kv_pb2_grpc.KvChannelServicer):
        async def FetchBytes(self, request: pb.FetchRequest, context: grpc.aio.ServicerContext) -> None:
            await owner.fetch(request, context)

    async def main() -> None:
        server = make_server(TRUST, me, {KV_SERVICE: Refusals("test")})
        kv_pb2_grpc.add_KvChannelServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
        listen(server, TRUST, me.target)
        await server.start()
        loops.append(asyncio.get_running_loop())
        started.set()
        await stopping.wait()
        await server.stop(None)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield
    finally:
        loops[0].call_soon_threadsafe(stopping.set)
        thread.join()


@contextmanager
def local_pair(num_slots: int, slot_bytes: int) -> Iterator[tuple[RingMemory, RingReader]]:
    ring = RingMemory(num_slots, slot_bytes)
    me = EngineRef(EngineId("p"), 1, "")
    owner = LocalOwner(ring, me)
    yield ring, LocalReader(me)
    owner.close()
    ring.close()
    with pytest.raises(PeerLost):
        LocalReader(me)


@pytest.mark.parametrize("transport", ["local", "shm", "grpc"])
def test_it_conforms(transport: str, tmp_path: Path) -> None:
    @contextmanager
    def shm_pair(num_slots: int, slot_bytes: int) -> Iterator[tuple[RingMemory, RingReader]]:
        ring = RingMemory(num_slots, slot_bytes)
        owner = ShmOwner(ring, tmp_path)
        yield ring, ShmReader(owner.invite(), num_slots, slot_bytes)
        owner.close()
        ring.close()

    @contextmanager
    def grpc_pair(num_slots: int, slot_bytes: int) -> Iterator[tuple[RingMemory, RingReader]]:
        ring = RingMemory(num_slots, slot_bytes)
        me = EngineRef(EngineId("p"), 1, f"unix:{tmp_path}/p.sock")
        owner = GrpcOwner(ring, me)
        with serving(owner, me):
            yield ring, Announced(owner, GrpcReader(me, 10, TRUST))
        ring.close()

    check_transport({"local": local_pair, "shm": shm_pair, "grpc": grpc_pair}[transport])


def test_a_slot_reused_during_the_copy_is_a_torn_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = RingMemory(2, 4096)
    ref = publish(ring, 0, b"first")
    real = np.copyto

    def slow_copy(target: np.ndarray, source: np.ndarray) -> None:
        real(target, source)
        ring.retire(0, ref.generation + 1)

    monkeypatch.setattr("diptych.kvtransfer.ring.np.copyto", slow_copy)
    with pytest.raises(TornRead, match="while it was read"):
        ring.read(ref, memoryview(bytearray(5)))
    with pytest.raises(TornRead, match="while it was read"):
        ring.frame(ref, 0, 5)
    monkeypatch.undo()
    ring.close()


def test_a_capability_is_good_for_one_attachment_and_none_is_good_for_nothing(tmp_path: Path) -> None:
    ring = RingMemory(2, 4096)
    owner = ShmOwner(ring, tmp_path)
    blob = owner.invite()
    reader = ShmReader(blob, 2, 4096)
    for bad in (blob, bytes(16) + blob[16:], blob[:16] + os.fsencode(tmp_path / "elsewhere")):
        with pytest.raises(PeerLost):
            ShmReader(bad, 2, 4096)
    reader.close()
    owner.close()
    owner.close()
    ring.close()


def test_a_peer_that_says_nothing_does_not_keep_others_out(tmp_path: Path) -> None:
    ring = RingMemory(2, 4096)
    owner = ShmOwner(ring, tmp_path)
    blob = owner.invite()
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(os.fsdecode(blob[16:]))
    ShmReader(blob, 2, 4096).close()
    owner.close()
    ring.close()


def test_an_owner_that_could_not_take_a_peer_takes_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "too many open files")]

    def accept_later(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_later)
    ring = RingMemory(2, 4096)
    owner = ShmOwner(ring, tmp_path)
    ShmReader(owner.invite(), 2, 4096).close()
    assert not failures
    owner.close()
    ring.close()


def test_a_reader_can_neither_write_nor_shrink_the_ring_and_outlives_its_owner(tmp_path: Path) -> None:
    ring = RingMemory(2, 4096)
    with pytest.raises(OSError, match="permitted"):
        os.ftruncate(ring.fd, 10)
    other = os.open(f"/proc/self/fd/{ring.fd}", os.O_RDWR)
    with pytest.raises(OSError, match="permitted"):
        os.write(other, b"x")
    os.close(other)
    owner = ShmOwner(ring, tmp_path)
    reader = ShmReader(owner.invite(), 2, 4096)
    ref = publish(ring, 1, b"still here")
    owner.close()
    ring.close()
    out = bytearray(ref.size_bytes)
    reader.read(ref, memoryview(out))
    assert out == b"still here"
    reader.close()


def test_a_run_directory_that_is_too_deep_is_named(tmp_path: Path) -> None:
    ring = RingMemory(2, 4096)
    with pytest.raises(StartupError, match="too long"):
        ShmOwner(ring, tmp_path / ("x" * 100))
    ring.close()


def test_fetch_bytes_needs_the_right_life_transfer_and_generation(tmp_path: Path) -> None:
    ring = RingMemory(2, 4096)
    me = EngineRef(EngineId("p"), 5, f"unix:{tmp_path}/p.sock")
    ref = publish(ring, 0, b"secret", 3)
    out = memoryview(bytearray(6))
    owner = GrpcOwner(ring, me)
    with serving(owner, me):
        for epoch, good in ((5, True), (4, False)):
            reader = GrpcReader(EngineRef(me.engine_id, epoch, me.target), 10, TRUST)
            if good:
                Announced(owner, reader).read(ref, out)
                assert bytes(out) == b"secret"
            else:
                with pytest.raises(PeerLost, match="UNAUTHENTICATED"):
                    Announced(owner, reader).read(ref, out)
            reader.close()
    reader = GrpcReader(me, 0.5, TRUST)
    with pytest.raises(PeerLost):
        reader.read(ref, out)
    reader.close()
    ring.close()


def test_a_fetch_without_the_capability_of_its_slot_looks_at_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = RingMemory(2, 4096)
    me = EngineRef(EngineId("p"), 5, f"unix:{tmp_path}/p.sock")
    mine, others = publish(ring, 0, b"secret", 3), publish(ring, 1, b"theirs", 4)
    owner = GrpcOwner(ring, me)
    good = owner.capability(mine.key, 0, mine.generation)
    bad = {
        "none": replace(mine, capability=b""),
        "one bit": replace(mine, capability=bytes([good[0] ^ 1]) + good[1:]),
        "cut short": replace(mine, capability=good[:-1]),
        "another slot": replace(others, capability=good),
        "another generation": replace(mine, generation=mine.generation + 1, capability=good),
        "another attempt": replace(mine, key=TransferKey(mine.key.transfer_id, 7), capability=good),
        "another life": replace(mine, capability=GrpcOwner(ring, me).capability(mine.key, 0, mine.generation)),
    }
    out = memoryview(bytearray(6))
    with serving(owner, me):
        reader = GrpcReader(me, 10, TRUST)
        with monkeypatch.context() as memory:
            memory.setattr(RingMemory, "lookup", lambda *_: pytest.fail("looked at"))
            memory.setattr(RingMemory, "frame", lambda *_: pytest.fail("read"))
            for ref in bad.values():
                with pytest.raises(PeerLost, match="PERMISSION_DENIED"):
                    reader.read(ref, out)
        assert owner.refused.total == len(bad)
        reader.read(replace(mine, capability=good), out)
        assert bytes(out) == b"secret"
        ring.retire(0, mine.generation + 1)
        with pytest.raises(TornRead):  # the right dies with the slot's generation
            reader.read(replace(mine, capability=good), out)
        reader.close()
    ring.close()


def test_generations_start_anew_with_each_ring_and_grow(tmp_path: Path) -> None:
    ring = RingMemory(2, 100)
    view = RingView(ring.fd, 2, 100, writable=False)
    assert [view.generation(slot) for slot in (0, 1)] == [1, 1]
    ring.retire(1, 2)
    assert view.generation(1) == 2
    assert view.lookup(1).size_bytes == 0
    view.close()
    ring.close()
    ring.close()
