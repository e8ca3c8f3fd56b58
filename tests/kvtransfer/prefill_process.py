"""A prefill engine's half of the hinge in its own process: argv is run_dir and transport. Run by test_processes.py.

It stages two prompts of 200 tokens whose KV is 0, 1, 2, ... and then waits to be killed or for its stdin to end.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc
import torch

from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.send import SendDriver
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey


async def main(run_dir: Path, transport: str) -> None:
    layout = KvLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)
    arena = KvArena(layout, 16)
    arena.storage.copy_(torch.arange(arena.storage.numel()).view(arena.storage.shape))
    me = EngineRef(EngineId("p0"), 7, f"unix:{run_dir}/p0.sock")
    driver = SendDriver(
        me=me,
        layout=layout,
        compat=b"same",
        arena=arena,
        settings=TransferSettings.model_validate({"transport": transport, "slot_kib": 64}),
        run_dir=run_dir,
        deliver=lambda event: print(event.error, flush=True),
    )
    server = grpc.aio.server()
    driver.attach(server)
    server.add_insecure_port(me.target)
    await server.start()
    driver.start()
    for number in (1, 2):
        key = TransferKey(number.to_bytes(16, "big"))
        driver.open(key, EngineRef(EngineId("d0"), 9, ""), 200)
        driver.computed(key, 200, range(13))
        driver.finish(key, 5, final=False)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    driver.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
