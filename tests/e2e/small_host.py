"""A small cluster in a thread of its own: tests and clients that block can be its guests, and many tests share it."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from small_cluster import SETTINGS, WAIT_S, SmallCluster, connected, small_cluster

from diptych.cluster.config import ModelSettings
from diptych.protos.settings import DecodeSettings, KvSettings, PrefillSettings

ROOMY = SETTINGS.model_copy(
    update={
        "kv": KvSettings(memory_mib=8, block_tokens=16),  # a schema in a prompt is a token for each byte
        "prefill": PrefillSettings(step_tokens=512, threads=1),
        "decode": DecodeSettings(step_tokens=512, threads=1),
    }
)


@contextmanager
def hosted(settings: ModelSettings = ROOMY) -> Iterator[SmallCluster]:
    """Connected. It belongs to another thread: use its listener's URL."""
    begun: Future[SmallCluster] = Future()
    ends: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        with tempfile.TemporaryDirectory(prefix="d-") as name:  # a socket's path has little room
            async with small_cluster(Path(name), Path(name), settings=settings) as cluster:
                await connected(cluster)
                end = asyncio.Event()
                ends.append((asyncio.get_running_loop(), end))
                begun.set_result(cluster)
                await end.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as exc:
            if begun.done():
                raise
            begun.set_exception(exc)

    thread = threading.Thread(target=run, name="small cluster")
    thread.start()
    try:
        yield begun.result(WAIT_S)
    finally:
        for loop, end in ends:
            loop.call_soon_threadsafe(end.set)
        thread.join(WAIT_S)
    assert not thread.is_alive(), "the small cluster does not end"
