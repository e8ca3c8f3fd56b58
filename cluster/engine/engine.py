"""One engine in this process: its parts, its three threads, its start and its end. The Ray actor is a shell around it.

step thread: workers, pool, runner | transfer thread: inside the drivers | asyncio thread: gRPC server, sessions
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial

import grpc
import torch

from diptych.cluster.control.host import free_ports
from diptych.protos.channels import ENGINE_SERVICE, KV_SERVICE, listen, make_server
from diptych.protos.errors import EngineFault, InvalidRequest, StartupError
from diptych.protos.faults import FaultPlan, Point, plan_of
from diptych.protos.ports import Runner, Worker
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.step import SampleSpec, StepPlan, StepRow
from diptych.protos.trust import Trust
from diptych.protos.types import Role

from .compose import BrainFactory, EngineParts, brain_of, compose
from .faults import pass_point
from .garbage import Pauses
from .loop import StepLoop
from .session import EngineSessions
from .spec import EngineSpec, EngineStarted
from .stall import StallWatch
from .thread import AsyncioThread, StepThread

# The step thread holds the GIL in short pieces; with Python's 5 ms it would wait that long to get it back.
SWITCH_INTERVAL_S = 0.0005
STOP_TIMEOUT_S = 10.0
WARM_UP_TOKENS = 64
BUSY_POLL_S = 0.02
TOLD_S = 1.0  # for routers to read that their requests were given up; one that does not is told by the stream's end

log = logging.getLogger(__name__)


class Engine:
    """`start` once, then `stop` once. `on_failure` is called when the step thread cannot go on, or does not."""

    def __init__(
        self,
        spec: EngineSpec,
        *,
        on_failure: Callable[[BaseException], None],
        brain: BrainFactory | None = None,
        trust: Trust | None = None,
    ) -> None:
        """Without `trust` it talks to this process alone."""
        if spec.host is not None and not spec.port:
            spec = dataclasses.replace(spec, port=free_ports(1, spec.host)[0])
        self._spec = spec
        self._trust = trust
        self._brain = brain or brain_of(spec)
        self._on_failure = on_failure
        self._parts: EngineParts
        self._loop: StepLoop
        self._sessions: EngineSessions
        self._server: grpc.aio.Server
        self._asyncio_thread: AsyncioThread
        self._step_thread = StepThread()
        self._stall_watch: StallWatch
        self._role_change = threading.Lock()
        self._faults = plan_of(spec.faults, spec.engine_id)
        self._pauses = Pauses(time.monotonic)

    def start(self) -> EngineStarted:
        """Load, warm up, listen, step. Seconds to minutes. Raises StartupError and what loading raises."""
        if self._faults is not None:
            pass_point(self._faults, Point.ENGINE_START)
        timeline: list[tuple[str, float]] = []
        last = time.monotonic()

        def mark(stage: str) -> None:
            nonlocal last
            now = time.monotonic()
            timeline.append((stage, now - last))
            last = now

        build_parts = partial(build, self._spec, self._brain, mark, trust=self._trust, faults=self._faults)
        self._parts = parts = self._step_thread.call(build_parts)
        self._loop = StepLoop(
            workers=parts.workers,
            inbox=parts.inbox,
            counts=parts.pool.counts,
            clock=time.monotonic,
            pipeline=parts.pipeline,
            names=(parts.pool.watch_names(), parts.outbox),
        )
        self._sessions = EngineSessions(
            info=parts.info,
            inbox=parts.inbox,
            outbox=parts.outbox,
            reading=self.status,
            possible_roles=self._spec.possible_roles,
            prefix_root=parts.pool.prefix_root,
            abandon=parts.sender.abort if parts.sender is not None else None,
            guides=parts.guides,
            faults=self._faults,
            clock=time.monotonic,
        )
        self._asyncio_thread = AsyncioThread()
        if parts.sender is not None:
            parts.sender.start()
        self._asyncio_thread.call(self._listen(), STOP_TIMEOUT_S)
        self._step_thread.begin(self._run_steps)
        self._stall_watch = StallWatch(
            lambda: self._loop.phase, limit_s=self._spec.step_stall_s, on_stall=self._fail_stalled
        )
        self._stall_watch.start()
        self._pauses.watch()
        mark("listen")
        return EngineStarted(parts.info, tuple(timeline), parts.memory_plan)

    def status(self) -> EngineStatus:
        """A reading of the loop, with the drivers' counters; from any thread."""
        reading = self._loop.reading()
        counters = dict(reading.counters)
        sender, receiver = self._parts.sender, self._parts.receiver
        transfers = 0
        for end in (sender, receiver):
            if end is not None:
                transfers += end.open_transfers
                for name, value in end.counters().items():  # both ends count under the same names
                    counters[name] = counters.get(name, 0.0) + value
        busy = sender.ring_slots_busy if sender is not None else 0
        counters["engine_outputs_lost_total"] = float(self._parts.outbox.outputs_lost)
        counters["engine_duplicate_orders_total"] = float(self._sessions.duplicates)
        counters["engine_collector_passes_total"] = float(self._pauses.passes)
        counters["engine_collector_seconds_total"] = self._pauses.seconds
        counters["engine_routers_lost_total"] = float(self._sessions.routers_lost)
        counters |= self._parts.guides.counters()
        if self._faults is not None:
            counters |= self._faults.counters()
        counters["engine_refused_calls_total"] = float(self._parts.refused[ENGINE_SERVICE].total)
        counters["kv_refused_calls_total"] = float(self._parts.refused[KV_SERVICE].total)
        return dataclasses.replace(reading, transfers=transfers, ring_slots_busy=busy, counters=counters)

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on: OpenMP keeps the number per calling thread."""
        self._loop.call(partial(torch.set_num_threads, count))

    @property
    def workers(self) -> Mapping[Role, Worker]:
        """The step thread's; others may look, not call."""
        return self._parts.workers

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._sessions.draining

    def drain(self, grace_s: float) -> bool:
        """Refuse new requests, wait for running ones, their last frames and KV that other engines have yet to fetch.

        False: some were left after `grace_s`; they end with ShuttingDown, for other engines to go on with.
        """
        if self._faults is not None:
            pass_point(self._faults, Point.ENGINE_DRAIN)
        self._asyncio_thread.call(self._sessions.refuse_all(), STOP_TIMEOUT_S)
        deadline = time.monotonic() + grace_s
        while (busy := self._is_busy()) and time.monotonic() < deadline:
            time.sleep(BUSY_POLL_S)
        if busy:
            self._give_away(self._spec.possible_roles)
        return not busy

    def _give_away(self, roles: Collection[Role]) -> None:
        for role in roles:
            self._asyncio_thread.call(self._sessions.give_away(role), STOP_TIMEOUT_S)
        deadline = time.monotonic() + TOLD_S
        while self._sessions.num_unsent and time.monotonic() < deadline:
            time.sleep(BUSY_POLL_S)

    def set_roles(self, roles: Collection[Role], grace_s: float) -> EngineInfo:
        """Be a prefill engine, a decode engine or both from now on; model, KV and sessions stay. Gives the new info.

        Requests of a role that goes may take `grace_s` to end; what is left ends with ShuttingDown, for others to go
        on with. Raises InvalidRequest for a role that it cannot have. Not from the asyncio or step thread.
        """
        wanted, possible = frozenset(roles), self._spec.possible_roles
        if not wanted or not wanted <= possible:
            able = " and ".join(sorted(possible))
            raise InvalidRequest(
                f"engine {self._spec.engine_id} can be {able}, not {' and '.join(sorted(wanted)) or 'nothing'}"
            )
        with self._role_change:
            leaving = self._sessions.info.roles - wanted
            self._asyncio_thread.call(self._sessions.leave_roles(leaving), STOP_TIMEOUT_S)
            deadline = time.monotonic() + grace_s
            while any(map(self._is_busy_as, leaving)) and time.monotonic() < deadline:
                time.sleep(BUSY_POLL_S)
            self._give_away(leaving)
            info = dataclasses.replace(self._sessions.info, roles=wanted)
            self._asyncio_thread.call(self._sessions.take_roles(info), STOP_TIMEOUT_S)
        return info

    def _is_busy_as(self, role: Role) -> bool:
        end = self._parts.sender if role is Role.PREFILL else self._parts.receiver
        return bool(self._sessions.num_requests_of(role) or (end is not None and end.open_transfers))

    def _is_busy(self) -> bool:
        ends = (self._parts.sender, self._parts.receiver)
        has_transfers = any(end.open_transfers for end in ends if end is not None)
        return bool(has_transfers or self._sessions.num_requests or self._sessions.num_unsent)

    def stop(self) -> None:
        """End sessions (their requests are cancelled), drivers and threads."""
        self._stall_watch.stop()
        self._pauses.end()
        if self._faults is not None:
            self._faults.close()
        self._asyncio_thread.call(self._unlisten(), STOP_TIMEOUT_S)
        if self._parts.sender is not None:
            self._parts.sender.stop()
        if self._parts.receiver is not None:
            self._parts.receiver.stop()
        self._loop.stop()
        self._parts.guides.close()
        self._step_thread.end(STOP_TIMEOUT_S)
        self._asyncio_thread.end(STOP_TIMEOUT_S)

    def _run_steps(self) -> None:
        try:
            self._loop.run()
        except BaseException as exc:
            log.exception("the step thread of engine %s ends", self._spec.engine_id)
            self._on_failure(exc)

    def _fail_stalled(self, seconds: float) -> None:
        self._on_failure(EngineFault(f"a step has taken more than {seconds:.1f} s"))

    async def _listen(self) -> None:
        trust = self._parts.trust
        self._server = make_server(trust, self._spec.ref, self._parts.refused)
        self._sessions.attach(self._server)
        if self._parts.sender is not None:
            self._parts.sender.attach(self._server)
        if self._parts.receiver is not None:
            self._parts.receiver.start(asyncio.get_running_loop())
        listen(self._server, trust, self._spec.ref.target)
        await self._server.start()

    async def _unlisten(self) -> None:
        await self._sessions.close()
        await self._server.stop(0.2)


def build(
    spec: EngineSpec,
    brain: BrainFactory,
    mark: Callable[[str], None],
    *,
    trust: Trust | None = None,
    faults: FaultPlan | None = None,
) -> EngineParts:
    """The parts of an engine, warm. Call it in the step thread, which alone computes. Raises what `compose` raises, and
    StartupError where the card has less memory by then than the plan was made with.
    """
    torch.set_num_threads(spec.threads)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        parts = compose(spec, brain=brain, mark=mark, trust=trust, faults=faults)
        warm_up(parts.runner, parts.info)
    except torch.OutOfMemoryError as exc:
        free, total = torch.cuda.mem_get_info()
        raise StartupError(
            f"engine {spec.engine_id} ran out of its card's memory while it started: {free / 2**30:.2f} of "
            f"{total / 2**30:.2f} GiB are free now; another process has taken some since the plan was made, or the "
            f"plan is wrong. Lower models.{spec.model}.gpu_share or set --kv-gib ({str(exc).splitlines()[0][:120]})"
        ) from exc
    mark("warm-up")
    return parts


def warm_up(runner: Runner, info: EngineInfo) -> None:
    """One prefill and one decode step in blocks that no request has yet: allocations, threads and code paths."""
    num_tokens = min(WARM_UP_TOKENS, runner.max_step_tokens, info.max_context_tokens - 1)
    blocks = tuple(range(-(-(num_tokens + 1) // info.block_tokens)))
    for step, (start, tokens) in enumerate(((0, (0,) * num_tokens), (num_tokens, None))):
        length = 1 if tokens is None else num_tokens
        sample = SampleSpec(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=start + length)
        row = StepRow(slot=0, num_tokens=length, tokens=tokens, start=start, blocks=blocks, sample=sample)
        runner.launch(StepPlan(step, (row,)))
        runner.collect()
