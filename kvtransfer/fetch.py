"""A few daemon threads for fetches that wait for the network; none is started before the first one is needed."""

from __future__ import annotations

import queue
import threading

from .mailbox import Job


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
