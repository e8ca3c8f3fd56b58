"""Engines in this process without router, HTTP or Ray: a batch of prompts in, the times of their tokens out.

For `diptych bench offline`: what the step loop can do when nothing else costs anything. One decode engine that computes
its prompts too, or a prefill and a decode engine with the hinge between them. A lone engine can be reached through its
gRPC sessions as well, with the same model in the same memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import grpc
import torch

from diptych.cluster.security import engine_name
from diptych.kvtransfer.layout import KvLayout
from diptych.protos.channels import listen, make_server
from diptych.protos.constraint import Constraint, Guide
from diptych.protos.errors import EngineFault, Overloaded, error_from_code
from diptych.protos.status import EngineInfo
from diptych.protos.trust import Trust
from diptych.protos.types import (
    DecodeOrder,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    Role,
    SamplingParams,
    StepOutput,
    TransferKey,
)

from .compose import Brain, BrainFactory, EngineParts, brain_of
from .engine import STOP_TIMEOUT_S, build
from .garbage import settle
from .inbox import CancelRequest
from .loop import StepLoop
from .session import EngineSessions
from .spec import EngineSpec
from .step_profile import Piece, StepProfile
from .step_times import StepTotals, TimedRunner
from .thread import AsyncioThread, StepThread

log = logging.getLogger(__name__)

STALL_S = 300.0  # a batch that gets no token for this long has failed


@dataclass(slots=True)
class Answered:
    """One request of a batch. Times are seconds since the batch was submitted."""

    num_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    cached_tokens: int = 0  # of the prompt, found in a prefix cache


class _Enough(Exception):
    """A batch has shown what it was wanted for."""


@dataclass(slots=True)
class _Batch:
    """Requests in work. Of the asyncio thread alone."""

    began: float
    answers: dict[TransferKey, Answered] = field(default_factory=dict)
    open: set[tuple[TransferKey, Role]] = field(default_factory=set)  # phases that have not ended
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # all phases have ended, or one has failed
    progress: int = 0
    failure: BaseException | None = None  # the first

    def take(self, role: Role, output: StepOutput, now: float) -> None:
        self.progress += 1
        for key, index in zip(output.keys, output.indexes, strict=True):
            answer = self.answers.get(key)
            if answer is None or index < answer.num_tokens:
                continue  # of an earlier batch, or a token that the other engine has told already
            if answer.num_tokens == 0:
                answer.first_token_s = now - self.began
            answer.num_tokens = index + 1
            answer.last_token_s = now - self.began
        for finish in output.finishes:
            self.open.discard((finish.key, role))
            if (answer := self.answers.get(finish.key)) is not None:
                answer.cached_tokens = max(answer.cached_tokens, finish.cached_tokens)
            if finish.reason is FinishReason.ERROR:
                self.fail(error_from_code(finish.error_code, finish.error_message, finish.error_param))
        if not self.open:
            self.changed.set()

    def fail(self, failure: BaseException) -> None:
        self.failure = self.failure or failure
        self.changed.set()

    def lose(self, role: Role, failure: BaseException) -> None:
        """An engine is gone: nobody ends its phases."""
        self.open = {phase for phase in self.open if phase[1] is not role}
        self.fail(failure)

    async def until_over(self) -> None:
        """Returns when every phase has ended. Raises the first failure, EngineFault when nothing happens."""
        seen = -1
        while self.open and self.failure is None:
            try:
                async with asyncio.timeout(STALL_S):
                    await self.changed.wait()
            except TimeoutError:
                if self.progress == seen:
                    raise EngineFault(f"no token in {STALL_S:g} s", f"{len(self.open)} phases are open") from None
                seen = self.progress
        if self.failure is not None:
            raise self.failure

    async def until_ended(self) -> None:
        """Returns when every phase has ended, however. Raises TimeoutError after STOP_TIMEOUT_S."""
        async with asyncio.timeout(STOP_TIMEOUT_S):
            while self.open:
                self.changed.clear()
                await self.changed.wait()


class OfflineEngines:
    """`start` once, `generate` any number of times, `stop` once. One thread may call."""

    def __init__(self, specs: Sequence[EngineSpec], *, has_sessions: bool = False) -> None:
        """`specs`: a decode engine, or a prefill and a decode engine. `has_sessions`: `sessions` will be called, so
        that the engine keeps the names of its blocks for routers all the time.
        """
        assert sorted(role for spec in specs for role in spec.roles) in ([Role.DECODE], [Role.DECODE, Role.PREFILL])
        assert len(specs) == 1 or not has_sessions
        self._specs = specs
        self._has_sessions = has_sessions
        self._parts: dict[Role, EngineParts] = {}
        self._runners: list[TimedRunner] = []
        self._loops: list[StepLoop] = []
        self._step_threads: list[StepThread] = []
        self._asyncio_thread = AsyncioThread()
        self._servers: list[grpc.aio.Server] = []
        self._batch: _Batch | None = None
        self._lost: BaseException | None = None  # what ended the step thread of an engine; of the asyncio thread
        self._keys = count(1)
        self._unsettle: Callable[[], None] = lambda: None
        self.timeline: list[tuple[str, float]] = []  # stage of the start, seconds

    def start(self) -> list[EngineInfo]:
        """Load, warm up, step. Raises StartupError and what loading raises."""
        last = time.monotonic()

        def mark(stage: str) -> None:
            nonlocal last
            now = time.monotonic()
            self.timeline.append((stage, now - last))
            last = now

        for spec in self._specs:
            thread = StepThread()
            self._step_threads.append(thread)
            (role,) = spec.roles
            self._parts[role] = thread.call(partial(build, spec, self._timed(brain_of(spec)), mark))
        for thread, parts in zip(self._step_threads, self._parts.values(), strict=True):
            self._asyncio_thread.call(self._listen(parts), STOP_TIMEOUT_S)
            if parts.sender is not None:
                parts.sender.start()
            loop = StepLoop(
                workers=parts.workers,
                inbox=parts.inbox,
                counts=parts.pool.counts,
                clock=time.monotonic,
                pipeline=parts.pipeline,
                names=(parts.pool.watch_names(), parts.outbox) if self._has_sessions else None,
            )
            self._loops.append(loop)
            thread.begin(partial(self._step, loop, parts))
        self.take_steps()
        return [parts.info for parts in self._parts.values()]

    def settle(self) -> None:
        """Do now what an engine does when nobody asks for anything, such as graphs of seldom sizes, and have the cycle
        collector leave alone what stays until `stop`. Once, before the first batch: as an engine that has been up for
        a few seconds. EngineFault: a step thread has not done so in STALL_S; what ended one is raised as it is.
        """
        for loop, runner in zip(self._loops, self._runners, strict=True):
            done = threading.Event()
            loop.call(partial(_do_all, runner, done))
            deadline = time.monotonic() + STALL_S
            while not done.wait(0.1):
                if self._lost is not None:
                    raise self._lost
                if time.monotonic() > deadline:
                    raise EngineFault(f"an engine is not idle after {STALL_S:g} s")
        self._unsettle = settle()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        salt: bytes,
        constraint: Constraint | None = None,
    ) -> list[Answered]:
        """Submit all at once, greedy, `num_tokens` each whatever they are; returns when the last token is here.

        Prompts share KV with those of equal `salt` only. Answers keep to `constraint`; one that ends by it is short.
        Raises the first error that an engine has, and EngineFault
        when nothing happens for STALL_S; the other requests were cancelled and have ended then.
        """
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        requests = [
            GenerateRequest(
                key=TransferKey(next(self._keys).to_bytes(16, "big")),
                prompt=tuple(prompt),
                sampling=sampling,
                salt=salt,
                constraint=constraint,
            )
            for prompt in prompts
        ]
        return self._asyncio_thread.call(self._answer(requests))

    @contextlib.contextmanager
    def sessions(self, secret: bytes) -> Iterator[EngineInfo]:
        """Meanwhile the lone engine serves routers that prove `secret` at the target of the info, as any engine does,
        and `generate` must not be called.
        """
        assert self._has_sessions
        (parts,) = self._parts.values()
        (loop,) = self._loops
        sessions = EngineSessions(
            info=parts.info,
            inbox=parts.inbox,
            outbox=parts.outbox,
            reading=loop.reading,
            prefix_root=parts.pool.prefix_root,
            guides=parts.guides,
        )
        trust = Trust(secret, engine_name(parts.info.roles))
        server = self._asyncio_thread.call(self._serve(parts, sessions, trust), STOP_TIMEOUT_S)
        try:
            yield parts.info
        finally:
            self._asyncio_thread.call(self._end_sessions(parts, sessions, server), STOP_TIMEOUT_S)

    @property
    def memory_plans(self) -> list[str]:
        """How the engines on cards divide them, for people."""
        return [parts.memory_plan for parts in self._parts.values() if parts.memory_plan]

    @property
    def lost(self) -> BaseException | None:
        """What ended the step thread of an engine."""
        return self._lost

    def take_steps(self) -> list[dict[str, StepTotals]]:
        """Of each engine, in the order of the specs, its steps since the last call, by kind. Between batches."""
        return [runner.take() for runner in self._runners]

    def pause_steps(self) -> None:
        """Before each batch: no step is to count the time since the last one."""
        for runner in self._runners:
            runner.pause()

    def profile(self, first: int, count: int, batch: Callable[[], None]) -> tuple[int, list[Piece]]:
        """Run `batch`, which generates, and trace its steps number `first` .. first + count - 1 of the last engine, the
        one that decodes; the batch ends there. Gives the number of steps that were traced and what ran in them.
        """
        runner, loop = self._runners[-1], self._loops[-1]
        on_card = runner.stream is not None

        def enough() -> None:
            self._asyncio_thread.loop.call_soon_threadsafe(self._end_batch, _Enough())

        profile = StepProfile(first=first, count=count, on_card=on_card, on_end=enough)
        profile.warm_up()
        runner.profile = profile
        ended = threading.Event()

        def end() -> None:
            runner.profile = None
            profile.close()
            ended.set()

        try:
            with contextlib.suppress(_Enough):
                batch()
        finally:
            loop.call(end)
            ended.wait(STOP_TIMEOUT_S)
        return profile.num_steps, profile.pieces()

    def report(self) -> dict[str, Any]:
        """Device, sizes in force and memory of the last engine, as JSON has them."""
        parts, runner, spec = list(self._parts.values())[-1], self._runners[-1], self._specs[-1]
        info, facts = parts.info, spec.facts
        layout = KvLayout(
            layers=facts.layers,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            dtype=info.dtype,
            block_tokens=info.block_tokens,
        )
        on_card = runner.stream is not None
        return {
            "device": torch.cuda.get_device_name() if on_card else "cpu",
            "dtype": info.dtype,
            "engine": {
                "max_running": runner.max_slots,
                "step_tokens": runner.max_step_tokens,
                "depth": runner.depth,
                "threads": spec.threads,
                "block_tokens": info.block_tokens,
                "num_blocks": info.num_blocks,
                "max_context_tokens": info.max_context_tokens,
            },
            "memory_mib": {
                "kv": info.num_blocks * layout.bytes_per_block >> 20,
                **(_card_memory() if on_card else {}),
            },
            "kv_tokens": info.num_blocks * info.block_tokens,
        }

    def stop(self) -> None:
        """End threads, drivers and servers."""
        try:
            for loop in self._loops:
                loop.stop()
            self._asyncio_thread.call(self._unlisten(), STOP_TIMEOUT_S)
            for parts in self._parts.values():
                parts.guides.close()
                if parts.sender is not None:
                    parts.sender.stop()
                if parts.receiver is not None:
                    parts.receiver.stop()
            for thread in self._step_threads:
                thread.end(STOP_TIMEOUT_S)
            self._asyncio_thread.end(STOP_TIMEOUT_S)
            self._parts.clear()
        finally:
            self._unsettle()

    def _end_batch(self, why: Exception) -> None:
        if self._batch is not None:
            self._batch.fail(why)

    async def _answer(self, requests: Sequence[GenerateRequest]) -> list[Answered]:
        if self._lost is not None:
            raise self._lost
        guides = [await self._guides(request) for request in requests]
        batch = self._batch = _Batch(time.perf_counter())
        try:
            for request, guided in zip(requests, guides, strict=True):
                self._submit(batch, request, guided)
            await batch.until_over()
        except Exception:
            for key, role in batch.open:
                self._parts[role].inbox.put(CancelRequest(role, key))
            with contextlib.suppress(TimeoutError):  # of an engine that hangs; why it all ended matters more
                await batch.until_ended()
            raise
        return list(batch.answers.values())

    async def _guides(self, request: GenerateRequest) -> dict[Role, Guide]:
        """Each engine's, of a request with a constraint."""
        if request.constraint is None:
            return {}
        return {role: await parts.guides.open(request) for role, parts in self._parts.items()}

    def _submit(self, batch: _Batch, request: GenerateRequest, guides: Mapping[Role, Guide]) -> None:
        decode, prefill = self._parts[Role.DECODE], self._parts.get(Role.PREFILL)
        peer, guide = prefill.info.ref if prefill else None, guides.get(Role.DECODE)
        orders: dict[Role, DecodeOrder | PrefillOrder] = {
            Role.DECODE: DecodeOrder(request=request, prefill=peer, guide=guide)
        }
        if prefill is not None:
            orders[Role.PREFILL] = PrefillOrder(request=request, decode=decode.info.ref, guide=guides.get(Role.PREFILL))
        for role, order in orders.items():
            if not self._parts[role].inbox.try_put(order):
                raise Overloaded("the engine takes no more requests: raise max_waiting of its pool")
            batch.open.add((request.key, role))
        batch.answers[request.key] = Answered()

    def _drain(self, parts: EngineParts) -> None:
        outputs, _ = parts.outbox.drain()
        parts.outbox.take_names()  # or the step thread would sum up all changes
        now = time.perf_counter()
        for role, output in outputs:
            if self._batch is not None:
                self._batch.take(role, output, now)

    async def _listen(self, parts: EngineParts) -> None:
        """The hinge's channel; it needs a server of the prefill engine's alone."""
        loop = asyncio.get_running_loop()
        parts.outbox.attach(loop, partial(self._drain, parts))
        if parts.receiver is not None:
            parts.receiver.start(loop)
        if parts.sender is not None:
            server = make_server(parts.trust, parts.info.ref, parts.refused)
            parts.sender.attach(server)
            listen(server, parts.trust, parts.info.ref.target)
            await server.start()
            self._servers.append(server)

    async def _unlisten(self) -> None:
        for server in self._servers:
            await server.stop(0.2)

    async def _serve(self, parts: EngineParts, sessions: EngineSessions, trust: Trust) -> grpc.aio.Server:
        server = make_server(trust, parts.info.ref, parts.refused)
        sessions.attach(server)
        listen(server, trust, parts.info.ref.target)
        await server.start()
        return server

    async def _end_sessions(self, parts: EngineParts, sessions: EngineSessions, server: grpc.aio.Server) -> None:
        await sessions.close()
        await server.stop(0.2)
        parts.outbox.attach(asyncio.get_running_loop(), partial(self._drain, parts))

    def _timed(self, brain: BrainFactory) -> BrainFactory:
        def timed(spec: EngineSpec) -> Brain:
            made = brain(spec)

            def runner(*arguments: Any) -> TimedRunner:
                self._runners.append(TimedRunner(made.runner(*arguments)))
                return self._runners[-1]

            return dataclasses.replace(made, runner=runner)

        return timed

    def _step(self, loop: StepLoop, parts: EngineParts) -> None:
        try:
            loop.run()
        except BaseException as exc:
            log.exception("the step thread of engine %s ends", parts.info.ref.engine_id)
            (role,) = parts.workers
            self._asyncio_thread.loop.call_soon_threadsafe(self._lose, role, exc)

    def _lose(self, role: Role, failure: BaseException) -> None:
        self._lost = self._lost or failure
        if self._batch is not None:
            self._batch.lose(role, failure)


def _card_memory() -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    taken = {
        "card_used": total - free,
        "card_reserved": torch.cuda.memory_reserved(),
        "card_allocated_peak": torch.cuda.max_memory_allocated(),
    }
    return {name: size >> 20 for name, size in taken.items()}


def _do_all(runner: TimedRunner, done: threading.Event) -> None:
    """In the step thread, between two steps."""
    while runner.idle():
        pass
    done.set()
