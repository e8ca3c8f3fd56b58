"""One fetch: copy a chunk to private memory and verify it. And a few daemon threads for fetches that wait for the
network; none is started before the first one is needed. No torch.
"""

from __future__ import annotations

import logging
import queue
import threading

from diptych.protos.errors import TransferError

from .mailbox import Job
from .messages import ChunkReady
from .receiver import FetchResult
from .ring import SlotRef, TornRead, checksum
from .transports.base import RingReader

log = logging.getLogger(__name__)


def read_chunk(reader: RingReader, ready: ChunkReady, buffer: bytearray) -> FetchResult:
    """Copy what `ready` announces into the first bytes of `buffer`, at least ready.size_bytes, and verify that copy."""
    ref = SlotRef(
        ready.key, ready.chunk, ready.slot, ready.slot_gen, ready.size_bytes, ready.checksum, ready.capability
    )
    try:
        with memoryview(buffer)[: ready.size_bytes] as data:
            reader.read(ref, data)
            return FetchResult.OK if checksum(data) == ready.checksum else FetchResult.CHECKSUM
    except TornRead as exc:
        log.warning("%s: %s", ready.key, exc)
        return FetchResult.TORN
    except TransferError as exc:
        log.warning("%s: %s", ready.key, exc)
        return FetchResult.ERROR


class FetchThreads:
    """`post` from one thread. Jobs must not raise."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def post(self, job: Job) -> None:
        """Run it on one of the threads."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run, name=f"kv-fetch-{index}", daemon=True)
                for index in range(self._num_threads)
            ]
            for thread in self._threads:
                thread.start()
        self._jobs.put(job)

    def stop(self) -> None:
        """Finish what is queued and join. The readers should be closed before, so that nothing waits for a peer."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
