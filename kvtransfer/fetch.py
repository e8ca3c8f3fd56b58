"""One fetch: copy a chunk to private memory and verify it. And a few daemon threads for fetches that wait for the
network; none is started before the first one is needed. No torch.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque

from diptych.protos.errors import TransferError
from diptych.protos.types import EngineId

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
    """`num_threads` threads, of which the jobs of one peer get `per_peer` at most: a peer that keeps its callers
    waiting leaves some to the others. Jobs must not raise.
    """

    def __init__(self, num_threads: int, per_peer: int) -> None:
        self._num_threads = num_threads
        self._per_peer = per_peer
        self._changed = threading.Condition()
        self._waiting: deque[tuple[EngineId, Job]] = deque()
        self._running: Counter[EngineId] = Counter()
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def post(self, peer: EngineId, job: Job) -> None:
        """Run it on one of the threads, after earlier jobs of the same peer have begun."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run, name=f"kv-fetch-{index}", daemon=True)
                for index in range(self._num_threads)
            ]
            for thread in self._threads:
                thread.start()
        with self._changed:
            self._waiting.append((peer, job))
            self._changed.notify()

    def stop(self) -> None:
        """Finish what is queued and join. The readers should be closed before, so that nothing waits for a peer."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            peer, job = taken
            try:
                job()
            finally:
                with self._changed:
                    self._running[peer] -= 1
                    self._changed.notify_all()

    def _take(self) -> tuple[EngineId, Job] | None:
        """Wait for a job that may run. None: stopped, and none is left."""
        with self._changed:
            while True:
                for at, (peer, job) in enumerate(self._waiting):
                    if self._running[peer] < self._per_peer:
                        del self._waiting[at]
                        self._running[peer] += 1
                        return peer, job
                if self._stopping and not self._waiting:
                    return None
                self._changed.wait()
