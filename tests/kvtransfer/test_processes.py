"""The hinge between two real processes: what the death of one, and a stop, leave of the other."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.receive import ReceiveDriver
from diptych.protos.errors import PeerLost
from diptych.protos.ports import Committed, Failed, ReceiveEvent, WantBlocks
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)
EventQueue = queue.SimpleQueue[ReceiveEvent]


def receiver(transport: str, arena: KvArena, **more: float) -> tuple[ReceiveDriver, EventQueue]:
    events: EventQueue = queue.SimpleQueue()
    driver = ReceiveDriver(
        me=EngineRef(EngineId("d0"), 9, ""),
        layout=LAYOUT,
        compat=b"same",
        arena=arena,
        settings=TransferSettings.model_validate({"transport": transport, "dial_timeout_s": 60} | more),
        deliver=events.put,
    )
    driver.start(asyncio.get_running_loop())
    return driver, events


async def sender(folder: Path, transport: str) -> asyncio.subprocess.Process:
    script = Path(__file__).with_name("prefill_process.py")
    argv = [sys.executable, str(script), str(folder), transport]
    return await asyncio.create_subprocess_exec(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def end(driver: ReceiveDriver) -> None:
    driver.stop()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("setting", "used"), [("auto", "shm"), ("grpc", "grpc")])
async def test_kv_crosses_processes_and_a_killed_peer_is_noticed_at_once(
    setting: str, used: str, tmp_path: Path
) -> None:
    arena = KvArena(LAYOUT, 16)
    slow = {"stall_s": 1000, "lease_s": 1000, "heartbeat_s": 1000, "silence_s": 1000}
    driver, events = receiver(setting, arena, **slow)
    peer = EngineRef(EngineId("p0"), 7, f"unix:{tmp_path}/p0.sock")
    first, second = (TransferKey(number.to_bytes(16, "big")) for number in (1, 2))
    process = await sender(tmp_path, setting)
    try:
        driver.expect(first, peer, 200, 0)
        assert await asyncio.to_thread(events.get, timeout=60) == WantBlocks(first)
        driver.grant(first, list(range(15, 2, -1)))
        committed = await asyncio.to_thread(events.get, timeout=60)
        assert isinstance(committed, Committed)
        assert (committed.transport, committed.size_bytes) == (used, 200 * LAYOUT.bytes_per_token)
        assert process.pid != os.getpid()
        wanted = torch.arange(arena.storage.numel(), dtype=torch.float32).view(arena.storage.shape)
        assert torch.equal(arena.storage[:, :, range(15, 3, -1)], wanted[:, :, range(12)])
        assert process.stdout is not None
        assert await process.stdout.readline() == b"None\n"  # released without an error
        driver.expect(second, peer, 200, 0)
        assert await asyncio.to_thread(events.get, timeout=60) == WantBlocks(second)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    failed = await asyncio.to_thread(events.get, timeout=60)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, PeerLost)
    driver.grant(second, list(range(13)))  # too late: nothing is written
    await end(driver)
    assert torch.equal(arena.storage[:, :, range(15, 3, -1)], wanted[:, :, range(12)])


@pytest.mark.parametrize("setting", ["auto", "grpc"])
async def test_a_stopped_peer_is_given_up_whether_or_not_it_has_bytes_to_give(setting: str, tmp_path: Path) -> None:
    arena = KvArena(LAYOUT, 16)
    driver, events = receiver(setting, arena, stall_s=1000, fetch_timeout_s=1000)
    peer = EngineRef(EngineId("p0"), 7, f"unix:{tmp_path}/p0.sock")
    first, second, third = (TransferKey(number.to_bytes(16, "big")) for number in (1, 2, 3))
    process = await sender(tmp_path, setting)
    try:
        driver.expect(first, peer, 200, 0)
        assert await asyncio.to_thread(events.get, timeout=60) == WantBlocks(first)
        process.send_signal(signal.SIGSTOP)
        if setting == "grpc":
            driver.grant(first, list(range(13)))  # the fetch of its first chunk hangs
        failed = await asyncio.to_thread(events.get, timeout=60)
        assert isinstance(failed, Failed)
        assert (failed.key, failed.error.code) == (first, PeerLost.code)
        assert driver.counters()["kv_pairs_lost_total"] == 1
        driver.expect(second, peer, 200, 0)  # the kernel takes the call, and nobody answers it
        failed = await asyncio.to_thread(events.get, timeout=60)
        assert isinstance(failed, Failed)
        assert (failed.key, failed.error.code) == (second, PeerLost.code)
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert b"gone" in await process.stdout.readline()  # it has let go of the first one
        driver.expect(third, peer, 200, 0)  # which it does not know; it takes the pair
        driver.abort(third, PeerLost("enough"))
        assert (await asyncio.to_thread(events.get, timeout=60)).key == third
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await end(driver)
    assert not arena.storage.any()
