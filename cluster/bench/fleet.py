"""Requests sent on a schedule, by this process or by several: how `diptych bench serve` keeps out of its own way.

A client that reads 20,000 events a second uses half a core, and while it reads those of one step it is late for the
next; several processes share the requests in turn and begin at the same moment.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import uvloop

from diptych.protos.errors import StartupError

from .stream import Streamed, Target, stream

_HEAD_START_S = 0.2  # for every process to learn when to begin
_READY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent: `offsets` are seconds from the start, one for each body, ascending."""

    target: Target
    bodies: Sequence[bytes]
    offsets: Sequence[float]
    concurrency: int | None  # most requests in work
    timeout_s: float

    def share(self, at: int, of: int) -> Load:
        """Every `of`-th request from number `at` on."""
        most = None if self.concurrency is None else self.concurrency // of + (at < self.concurrency % of)
        return Load(
            target=self.target,
            bodies=self.bodies[at::of],
            offsets=self.offsets[at::of],
            concurrency=most,
            timeout_s=self.timeout_s,
        )


@dataclass(slots=True)
class Sent:
    """How it went; both sequences are in the order of the requests. `cpu`: of one core, each process's use of it."""

    outcomes: list[Streamed]
    late_s: list[float]  # how late each request was begun against its schedule
    cpu: list[float]


def send(load: Load, clients: int) -> Sent:
    """Send everything and wait for all answers. Raises StartupError."""
    if load.concurrency is not None and load.concurrency < clients:
        raise StartupError(f"--clients {clients}: more than the --concurrency of {load.concurrency} that they share")
    clients = max(1, min(clients, len(load.bodies)))
    if clients == 1:
        return uvloop.run(_send(load, time.perf_counter()))
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for at in range(clients):
            ours, theirs = spawn.Pipe()
            pipes.append(ours)
            processes.append(spawn.Process(target=_serve, args=(theirs, load.share(at, clients)), daemon=True))
            processes[-1].start()
            theirs.close()
        parts = _together(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
    return _in_order(parts, len(load.bodies))


def _together(pipes: Sequence[Connection]) -> list[Sent]:
    try:
        for pipe in pipes:
            if not pipe.poll(_READY_S):
                raise StartupError(f"a client process was not ready after {_READY_S:g} s")
            pipe.recv()
        begin_at = time.perf_counter() + _HEAD_START_S  # one clock for all processes of a machine
        for pipe in pipes:
            pipe.send(begin_at)
        return [pipe.recv() for pipe in pipes]
    except (EOFError, ConnectionError):
        raise StartupError("a client process has ended") from None


def _in_order(parts: Sequence[Sent], count: int) -> Sent:
    turn = [divmod(number, len(parts)) for number in range(count)]
    return Sent(
        [parts[part].outcomes[at] for at, part in turn],
        [parts[part].late_s[at] for at, part in turn],
        [part.cpu[0] for part in parts],
    )


def _serve(pipe: Connection, load: Load) -> None:
    """A client process."""
    pipe.send(None)
    begin_at: float = pipe.recv()
    pipe.send(uvloop.run(_send(load, begin_at)))


async def _send(load: Load, begin_at: float) -> Sent:
    gate = asyncio.Semaphore(load.concurrency or len(load.bodies))

    async def one(body: bytes) -> Streamed:
        async with gate:
            return await stream(load.target, body, load.timeout_s)

    tasks, late_s = [], []
    began, used = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for body, offset in zip(load.bodies, load.offsets, strict=True):
            if (wait_s := begin_at + offset - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            late_s.append(max(time.perf_counter() - begin_at - offset, 0.0))
            tasks.append(group.create_task(one(body)))
    wall_s = time.perf_counter() - max(began, begin_at)
    share = (time.process_time() - used) / wall_s if wall_s > 0 else 0.0
    return Sent([task.result() for task in tasks], late_s, [round(share, 3)])
