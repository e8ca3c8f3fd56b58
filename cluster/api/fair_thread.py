"""A thread for long work of requests, in which tenants take turns: one that sends many long texts waits for itself.

Used by render.py and text_model.py to tokenise. Whose work it is stands in the context of the task, from access.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Final, TypeVar

from diptych.cluster.batches.seats import Seats

TENANT: Final = ContextVar("TENANT", default="")  # of the request that this task is about

ResultT = TypeVar("ResultT")


class FairThread:
    """For one event loop. Starts with its first work."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._turns = Seats(1)

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """What `work` returns, in its tenant's turn. Raises what it raises."""
        async with self._turns.seat(TENANT.get()):
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """No more of it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
