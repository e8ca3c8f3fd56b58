"""The hinge between two real processes, and what a kill -9 of one leaves of the other."""

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


@pytest.mark.parametrize(("setting", "used"), [("auto", "shm"), ("grpc", "grpc")])
async def test_kv_crosses_processes_and_a_killed_peer_is_noticed_at_once(
    setting: str, used: str, tmp_path: Path
) -> None:
    layout = KvLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)
    arena = KvArena(layout, 16)
    events: queue.SimpleQueue[ReceiveEvent] = queue.SimpleQueue()
    slow = {"stall_s": 1000, "lease_s": 1000, "heartbeat_s": 1000, "dial_timeout_s": 60}
    driver = ReceiveDriver(
        me=EngineRef(EngineId("d0"), 9, ""),
        layout=layout,
        compat=b"same",
        arena=arena,
        settings=TransferSettings.model_validate({"transport": setting} | slow),
        deliver=events.put,
    )
    driver.start(asyncio.get_running_loop())
    peer = EngineRef(EngineId("p0"), 7, f"unix:{tmp_path}/p0.sock")
    script = Path(__file__).with_name("prefill_process.py")
    argv = [sys.executable, str(script), str(tmp_path), setting]
    first, second = (TransferKey(number.to_bytes(16, "big")) for number in (1, 2))
    process = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        driver.expect(first, peer, 200, 0)
        assert await asyncio.to_thread(events.get, timeout=60) == WantBlocks(first)
        driver.grant(first, list(range(15, 2, -1)))
        committed = await asyncio.to_thread(events.get, timeout=60)
        assert isinstance(committed, Committed)
        assert (committed.transport, committed.size_bytes) == (used, 200 * layout.bytes_per_token)
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
    driver.stop()
    assert torch.equal(arena.storage[:, :, range(15, 3, -1)], wanted[:, :, range(12)])
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*tasks, return_exceptions=True)
