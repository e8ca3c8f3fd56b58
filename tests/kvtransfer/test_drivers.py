"""Both drivers over real gRPC on unix sockets, with real arenas; clocks run, but nothing is decided by timing."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
import torch

from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout, compat_digest
from diptych.kvtransfer.receive import ReceiveDriver
from diptych.kvtransfer.send import SendDriver
from diptych.kvtransfer.transports.shm import ShmOwner
from diptych.protos.errors import Cancelled, EngineFault, LayoutMismatch, PeerLost, StartupError
from diptych.protos.ports import Closed, Committed, Failed, ReceiveEvent, Released, SendEvent, WantBlocks
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

WAIT_S = 20


def make_layout(block_tokens: int, dtype: str = "float32", layers: int = 4) -> KvLayout:
    return KvLayout(layers=layers, kv_heads=2, head_dim=16, dtype=dtype, block_tokens=block_tokens)


def make_key(number: int, attempt: int = 0) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"), attempt)


@dataclass
class Prefill:
    driver: SendDriver
    arena: KvArena
    me: EngineRef
    server: grpc.aio.Server
    events: queue.SimpleQueue[SendEvent]

    async def stop(self) -> None:
        await self.server.stop(None)
        self.driver.stop()


@dataclass
class Decode:
    driver: ReceiveDriver
    arena: KvArena
    me: EngineRef
    events: queue.SimpleQueue[ReceiveEvent]


@dataclass
class Hinge:
    folder: Path
    made: list[Callable[[], object]] = field(default_factory=list)

    async def prefill(
        self, layout: KvLayout, settings: TransferSettings, *, name: str = "p0", epoch: int = 7, weights: bytes = b"w"
    ) -> Prefill:
        me = EngineRef(EngineId(name), epoch, f"unix:{self.folder}/{name}.sock")
        arena = KvArena(layout, 64)
        arena.storage.copy_(torch.randn(arena.storage.shape))
        events: queue.SimpleQueue[SendEvent] = queue.SimpleQueue()
        driver = SendDriver(
            me=me,
            layout=layout,
            compat=compat_digest(layout, weights_digest=weights, attention=b""),
            arena=arena,
            settings=settings,
            run_dir=self.folder,
            deliver=events.put,
        )
        server = grpc.aio.server()
        driver.attach(server)
        server.add_insecure_port(me.target)
        await server.start()
        driver.start()
        made = Prefill(driver, arena, me, server, events)
        self.made.append(made.stop)
        return made

    def decode(self, layout: KvLayout, settings: TransferSettings, *, name: str = "d0", epoch: int = 9) -> Decode:
        me = EngineRef(EngineId(name), epoch, "unix:/nowhere")
        events: queue.SimpleQueue[ReceiveEvent] = queue.SimpleQueue()
        arena = KvArena(layout, 64)
        driver = ReceiveDriver(
            me=me,
            layout=layout,
            compat=compat_digest(layout, weights_digest=b"w", attention=b""),
            arena=arena,
            settings=settings,
            deliver=events.put,
        )
        driver.start(asyncio.get_running_loop())
        self.made.append(driver.stop)
        return Decode(driver, arena, me, events)


@asynccontextmanager
async def make_hinge(folder: Path) -> AsyncIterator[Hinge]:
    hinge = Hinge(folder)
    try:
        yield hinge
    finally:
        for stop in reversed(hinge.made):
            done = stop()
            if asyncio.iscoroutine(done):
                await done
        await asyncio.sleep(0)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*tasks, return_exceptions=True)


Event = TypeVar("Event", SendEvent, ReceiveEvent)


async def take(events: queue.SimpleQueue[Event]) -> Event:
    return await asyncio.to_thread(events.get, timeout=WAIT_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110, the condition lives in another thread
            await asyncio.sleep(0.005)


def blocks_for(arena: KvArena, num_tokens: int, seed: int) -> list[int]:
    order = torch.randperm(arena.num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return [int(block) for block in order[: arena.layout.blocks_for(num_tokens)]]


def wire(arena: KvArena, blocks: list[int], tok_from: int, tok_to: int) -> bytearray:
    data = bytearray((tok_to - tok_from) * arena.layout.bytes_per_token)
    arena.pack(blocks, tok_from, tok_to, memoryview(data))
    return data


def settings(transport: str, **more: float) -> TransferSettings:
    # 64 KiB slots: 32 or 64 tokens per chunk, so that prompts take many
    return TransferSettings.model_validate({"transport": transport, "slot_kib": 64, "slots": 4} | more)


async def send_whole(p: Prefill, d: Decode, key: TransferKey, num_tokens: int, have: int) -> list[int]:
    """A transfer from one end to the other; returns P's blocks."""
    blocks = blocks_for(p.arena, num_tokens, seed=num_tokens)
    d.driver.expect(key, p.me, num_tokens, have)
    p.driver.open(key, d.me, num_tokens)
    for upto in (num_tokens // 3, num_tokens // 2, num_tokens):
        p.driver.computed(key, upto, blocks)
    p.driver.finish(key, 42, final=False)
    return blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("transport", "used"), [("auto", "local"), ("shm", "shm"), ("grpc", "grpc")])
@pytest.mark.parametrize(("size_p", "size_d"), [(16, 16), (5, 16), (16, 7)])
async def test_bytes_arrive_equal(
    transport: str, used: str, dtype: str, size_p: int, size_d: int, tmp_path: Path
) -> None:
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(size_p, dtype), settings(transport))
        d = hinge.decode(make_layout(size_d, dtype), settings(transport))
        for number, (num_tokens, have) in enumerate([(200, 0), (111, 3 * size_d), (1, 0)]):
            key = make_key(number)
            source = await send_whole(p, d, key, num_tokens, have)
            assert await take(d.events) == WantBlocks(key)
            target = blocks_for(d.arena, num_tokens, seed=99)
            before = d.arena.storage.clone()
            d.driver.grant(key, target)
            committed = await take(d.events)
            assert isinstance(committed, Committed)
            expected_bytes = (num_tokens - have) * p.arena.layout.bytes_per_token
            assert (committed.key, committed.first_token, committed.final) == (key, 42, False)
            assert (committed.size_bytes, committed.transport) == (expected_bytes, used)
            assert wire(d.arena, target, have, num_tokens) == wire(p.arena, source, have, num_tokens)
            untouched = [block for block in range(64) if block not in target]
            assert torch.equal(d.arena.storage[:, :, untouched], before[:, :, untouched])
            assert torch.equal(d.arena.storage[:, :, target[0]][..., :have, :], before[:, :, target[0]][..., :have, :])
            released = await take(p.events)
            assert isinstance(released, Released)
            assert (released.key, released.error, released.size_bytes) == (key, None, expected_bytes)
        assert p.driver.ring_slots_busy == 0
        assert p.driver.open_transfers == d.driver.open_transfers == 0
        assert p.driver.counters()["kv_transfers_total"] == 3
        assert d.driver.counters()[f"kv_pairs_{used}_total"] == 1
        assert p.driver.counters()["kv_thread_faults_total"] == d.driver.counters()["kv_thread_faults_total"] == 0


@pytest.mark.parametrize("num_tokens", [1, 32, 45, 48])
async def test_nothing_of_an_earlier_sequence_follows_the_prompt_in_its_last_block(
    num_tokens: int, tmp_path: Path
) -> None:
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("shm"))
        d = hinge.decode(make_layout(16), settings("shm"))
        d.arena.storage.fill_(float("nan"))  # what a request that failed on a NaN may leave behind
        await send_whole(p, d, make_key(1), num_tokens, 0)
        assert await take(d.events) == WantBlocks(make_key(1))
        target = blocks_for(d.arena, num_tokens, seed=3)
        d.driver.grant(make_key(1), target)
        assert isinstance(await take(d.events), Committed)
        assert bool(torch.isfinite(d.arena.storage[:, :, target]).all())


async def test_many_transfers_share_few_slots(tmp_path: Path) -> None:
    """Three decode engines, four slots, grants in the wrong order: all arrive, nothing is left behind."""
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("shm", pair_min_slots=1))
        ds = [hinge.decode(make_layout(16), settings("shm"), name=f"d{index}") for index in range(3)]
        sources = {}
        for number in range(12):
            sources[number] = await send_whole(p, ds[number % 3], make_key(number), 100 + number, 0)

        async def serve(d: Decode, numbers: list[int]) -> None:
            committed = 0
            while committed < len(numbers):
                event = await take(d.events)
                number = int.from_bytes(event.key.transfer_id, "big")
                target = blocks_for(d.arena, 100 + number, seed=number)
                if isinstance(event, WantBlocks):
                    d.driver.grant(event.key, target)
                else:
                    assert isinstance(event, Committed)
                    wanted = wire(p.arena, sources[number], 0, 100 + number)
                    assert wire(d.arena, target, 0, 100 + number) == wanted
                    committed += 1

        async with asyncio.TaskGroup() as tasks:
            for index, d in enumerate(ds):
                tasks.create_task(serve(d, list(range(index, 12, 3))))
        for _ in range(12):
            event = await take(p.events)
            assert event.error is None
        assert p.driver.ring_slots_busy == 0


async def test_both_roles_may_live_in_one_engine(tmp_path: Path) -> None:
    """Same identity, same process, same arena: the handoff goes from blocks to other blocks."""
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("auto"))
        d = hinge.decode(make_layout(16), settings("auto"), name=p.me.engine_id, epoch=p.me.epoch)
        d.driver._arena, d.driver._unpack = p.arena, p.arena.unpack
        source, target = list(range(10)), list(range(20, 30))
        p.driver.open(make_key(1), d.me, 150)
        d.driver.expect(make_key(1), p.me, 150, 0)
        p.driver.computed(make_key(1), 150, source)
        p.driver.finish(make_key(1), 1, final=False)
        assert await take(d.events) == WantBlocks(make_key(1))
        d.driver.grant(make_key(1), target)
        committed = await take(d.events)
        assert isinstance(committed, Committed)
        assert committed.transport == "local"
        assert wire(p.arena, source, 0, 150) == wire(p.arena, target, 0, 150)
        assert (await take(p.events)).error is None


async def test_token_0_may_end_the_request_without_a_transfer(tmp_path: Path) -> None:
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("shm"))
        d = hinge.decode(make_layout(16), settings("shm"))
        p.driver.open(make_key(1), d.me, 10)
        p.driver.finish(make_key(1), 2, final=True)
        assert (await take(p.events)).error is None
        d.driver.expect(make_key(1), p.me, 10, 0)
        assert await take(d.events) == Committed(make_key(1), 2, final=True)


async def test_an_abort_at_either_end_reaches_the_other(tmp_path: Path) -> None:
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("shm"))
        d = hinge.decode(make_layout(16), settings("shm"))
        await send_whole(p, d, make_key(1), 100, 0)
        assert await take(d.events) == WantBlocks(make_key(1))
        d.driver.abort(make_key(1), Cancelled("the client is gone"))
        assert await take(d.events) == Closed(make_key(1))
        assert isinstance((await take(p.events)).error, Cancelled)
        await send_whole(p, d, make_key(2), 100, 0)
        assert await take(d.events) == WantBlocks(make_key(2))
        p.driver.abort(make_key(2), EngineFault("the step raised"))
        failed = await take(d.events)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, EngineFault)
        assert (await take(p.events)).key == make_key(2)
        await until(lambda: p.driver.ring_slots_busy == 0)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_a_dead_peer_ends_its_transfers_at_once(transport: str, tmp_path: Path) -> None:
    slow = {"lease_s": 1000, "stall_s": 1000, "heartbeat_s": 1000}
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings(transport, **slow))
        d, other = (hinge.decode(make_layout(16), settings(transport, **slow), name=name) for name in ("d0", "d1"))
        for number, decode in ((1, d), (2, other)):
            await send_whole(p, decode, make_key(number), 100, 0)
            assert await take(decode.events) == WantBlocks(make_key(number))
        d.driver.stop()
        released = await take(p.events)
        assert released.key == make_key(1)
        assert isinstance(released.error, PeerLost)
        other.driver.grant(make_key(2), blocks_for(other.arena, 100, 1))  # the other pair does not notice
        assert isinstance(await take(other.events), Committed)
        assert (await take(p.events)).error is None
        await send_whole(p, other, make_key(3), 100, 0)
        assert await take(other.events) == WantBlocks(make_key(3))
        await p.stop()
        failed = await take(other.events)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, PeerLost)


async def test_a_prefill_engine_that_comes_late_or_again_is_found(tmp_path: Path) -> None:
    async with make_hinge(tmp_path) as hinge:
        d = hinge.decode(make_layout(16), settings("shm", dial_timeout_s=15))
        me = EngineRef(EngineId("p0"), 7, f"unix:{tmp_path}/p0.sock")
        d.driver.expect(make_key(1), me, 20, 0)
        await asyncio.sleep(0.1)  # the first dial meets nobody
        p = await hinge.prefill(make_layout(16), settings("shm"))
        p.driver.open(make_key(1), d.me, 20)
        p.driver.finish(make_key(1), 2, final=True)
        assert isinstance(await take(d.events), Committed)
        await p.stop()
        again = await hinge.prefill(make_layout(16), settings("shm"), epoch=8)
        again.driver.open(make_key(2), d.me, 20)
        again.driver.finish(make_key(2), 3, final=True)
        d.driver.expect(make_key(2), again.me, 20, 0)
        assert isinstance(await take(d.events), Committed)
        d.driver.expect(make_key(3), me, 20, 0)  # a placement that names the dead life
        failed = await take(d.events)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, PeerLost)


async def test_nobody_there_is_told_within_the_dial_timeout(tmp_path: Path) -> None:
    async with make_hinge(tmp_path) as hinge:
        d = hinge.decode(make_layout(16), settings("shm", dial_timeout_s=0.2))
        d.driver.expect(make_key(1), EngineRef(EngineId("p0"), 1, f"unix:{tmp_path}/none.sock"), 20, 0)
        failed = await take(d.events)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, PeerLost)


@pytest.mark.parametrize(
    ("layout", "weights", "transport", "words"),
    [
        (make_layout(16, layers=3), b"w", "shm", "layers 3 here and 4 there"),
        (make_layout(16, "bfloat16"), b"w", "shm", "dtype bfloat16 here and float32 there"),
        (make_layout(16), b"other", "shm", "do not serve the same model"),
        (make_layout(16), b"w", "grpc", "no common transport"),
    ],
)
async def test_a_pair_that_does_not_fit_is_refused_in_words(
    layout: KvLayout, weights: bytes, transport: str, words: str, tmp_path: Path
) -> None:
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(layout, settings(transport), weights=weights)
        d = hinge.decode(make_layout(16), settings("shm"))
        d.driver.expect(make_key(1), p.me, 20, 0)
        failed = await take(d.events)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, LayoutMismatch)
        assert words in str(failed.error)


async def test_shm_that_cannot_be_attached_steps_down_to_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.kvtransfer.transports.local.is_here", lambda peer: False)
    monkeypatch.setattr(ShmOwner, "invite", lambda self: b"0" * 16 + os.fsencode(tmp_path / "gone.sock"))
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("auto"))
        d = hinge.decode(make_layout(16), settings("auto"))
        await send_whole(p, d, make_key(1), 50, 0)
        assert await take(d.events) == WantBlocks(make_key(1))
        d.driver.grant(make_key(1), blocks_for(d.arena, 50, 1))
        committed = await take(d.events)
        assert isinstance(committed, Committed)
        assert committed.transport == "grpc"
        assert d.driver.counters()["kv_transport_downgrades_total"] == 1


async def test_a_flipped_byte_is_noticed_and_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("shm"))
        d = hinge.decode(make_layout(16), settings("shm"))
        await send_whole(p, d, make_key(1), 30, 0)
        assert await take(d.events) == WantBlocks(make_key(1))
        busy = next(index for index, slot in enumerate(p.driver._machine.ledger.slots) if slot.state == "staged")
        with p.driver._ring.data(busy, 100) as data:
            data[50] ^= 1
        d.driver.grant(make_key(1), blocks_for(d.arena, 30, 1))
        failed = await take(d.events)
        assert isinstance(failed, Failed)
        assert failed.error.code == "kv_checksum"
        assert d.driver.counters()["kv_checksum_failures_total"] == 2
        assert not d.arena.storage.any()
        assert (await take(p.events)).error is not None
        assert p.driver.counters()["kv_checksum_failures_total"] == 1


async def test_a_bad_block_list_ends_one_transfer_and_not_the_engine(tmp_path: Path) -> None:
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("shm"))
        d = hinge.decode(make_layout(16), settings("shm"))
        d.driver.expect(make_key(1), p.me, 30, 0)
        p.driver.open(make_key(1), d.me, 30)
        p.driver.computed(make_key(1), 30, [1000, 2000])
        assert isinstance((await take(p.events)).error, EngineFault)
        assert isinstance(await take(d.events), Failed)
        await send_whole(p, d, make_key(2), 30, 0)
        assert await take(d.events) == WantBlocks(make_key(2))
        d.driver.grant(make_key(2), [77, 78])
        failed = await take(d.events)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, EngineFault)
        assert (await take(p.events)).error is not None


async def test_stop_gives_back_descriptors_and_files(tmp_path: Path) -> None:
    def rings() -> int:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_exists(fd)]
        return sum("diptych-kv-ring" in link for link in links)

    def fd_exists(fd: str) -> bool:
        return os.path.lexists(f"/proc/self/fd/{fd}")

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("diptych-kv-ring")

    before = (rings(), mappings())
    async with make_hinge(tmp_path) as hinge:
        p = await hinge.prefill(make_layout(16), settings("shm"))
        d = hinge.decode(make_layout(16), settings("shm"))
        await send_whole(p, d, make_key(1), 30, 0)
        assert await take(d.events) == WantBlocks(make_key(1))
        assert (rings(), mappings()) > before
        await p.stop()
        d.driver.stop()
        assert (rings(), mappings()) == before
        assert not [name for name in os.listdir(tmp_path) if name.startswith("kv-")]


def test_a_slot_too_small_for_a_token_is_a_startup_error(tmp_path: Path) -> None:
    layout = KvLayout(layers=64, kv_heads=8, head_dim=128, dtype="float32", block_tokens=16)
    with pytest.raises(StartupError, match="slot_kib"):
        SendDriver(
            me=EngineRef(EngineId("p"), 1, ""),
            layout=layout,
            compat=b"",
            arena=KvArena(make_layout(16), 1),
            settings=settings("shm"),
            run_dir=tmp_path,
            deliver=lambda event: None,
        )
