"""SIGTERM in a process of Ray, which ends at once by Ray: here the first one lets work be finished, the second ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


def on_first_sigterm(act: Callable[[], None]) -> None:
    """`act` is called in the main thread and must return at once. Main thread only: of an actor with threads that is
    where Ray calls the constructor.
    """
    before = signal.getsignal(signal.SIGTERM)

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        act()

    signal.signal(signal.SIGTERM, first)


def work_before_sigterm_ends(work: Callable[[], None]) -> None:
    """`work` is called in a thread of its own, and when it returns the process ends as Ray ends it.

    From any thread: an actor with an event loop never runs in the main thread, so the handler itself cannot be
    replaced; the function that Ray's handler ends with can.
    """
    from ray._private import worker

    ray_worker: Any = worker
    end = ray_worker.raise_sys_exit_with_custom_error_message

    def run() -> None:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def first(*args: Any, **options: Any) -> None:
        ray_worker.raise_sys_exit_with_custom_error_message = end
        threading.Thread(target=run, name="sigterm", daemon=True).start()

    ray_worker.raise_sys_exit_with_custom_error_message = first
