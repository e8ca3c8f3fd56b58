"""Engines in this process without router, HTTP or Ray: a batch of prompts in, the times of their tokens out.

For `diptych bench offline`: what the step loop can do when nothing else costs anything. One decode engine that computes
its prompts too, or a prefill and a decode engine with the hinge between them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import grpc

from diptych.protos.errors import EngineFault, Overloaded, error_from_code
from diptych.protos.status import EngineInfo
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

from .compose import BrainFactory, EngineParts, brain_of, model_brain
from .engine import SERVER_OPTIONS, STOP_TIMEOUT_S, build
from .loop import StepLoop
from .spec import EngineSpec
from .thread import StepThread

STALL_S = 300.0  # a batch that gets no token for this long has failed


@dataclass(slots=True)
class Answered:
    """One request of a batch. Times are seconds since the batch was submitted."""

    num_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    cached_tokens: int = 0  # of the prompt, found in a prefix cache


@dataclass(slots=True)
class _Batch:
    """Requests in work. Written by the asyncio thread alone."""

    began: float
    answers: dict[TransferKey, Answered]
    open: set[tuple[TransferKey, Role]]
    done: threading.Event = field(default_factory=threading.Event)
    progress: int = 0
    failure: BaseException | None = None

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
                self.fail(error_from_code(finish.error_code, finish.error_message))
        if not self.open:
            self.done.set()

    def fail(self, failure: BaseException) -> None:
        self.failure = self.failure or failure
        self.done.set()


class OfflineEngines:
    """`start` once, `generate` any number of times, `stop` once. One thread may call."""

    def __init__(self, specs: Sequence[EngineSpec], *, random_seed: int | None = None) -> None:
        """`specs`: a decode engine, or a prefill and a decode engine. With `random_seed` no weights are read."""
        assert sorted(role for spec in specs for role in spec.roles) in ([Role.DECODE], [Role.DECODE, Role.PREFILL])
        self._specs = specs
        self._random_seed = random_seed
        self._parts: dict[Role, EngineParts] = {}
        self._loops: list[StepLoop] = []
        self._step_threads: list[StepThread] = []
        self._asyncio_thread = threading.Thread(target=self._run_asyncio, name="asyncio", daemon=True)
        self._servers: list[grpc.aio.Server] = []
        self._asyncio = asyncio.new_event_loop()
        self._batch: _Batch | None = None
        self._keys = count(1)

    def start(self) -> list[EngineInfo]:
        """Load, warm up, step. Raises StartupError and what loading raises."""
        self._asyncio_thread.start()
        for spec in self._specs:
            thread = StepThread()
            self._step_threads.append(thread)
            (role,) = spec.roles
            self._parts[role] = thread.call(partial(build, spec, self._brain(spec), lambda stage: None))
        for thread, parts in zip(self._step_threads, self._parts.values(), strict=True):
            self._in_asyncio(self._listen(parts))
            if parts.sender is not None:
                parts.sender.start()
            loop = StepLoop(workers=parts.workers, inbox=parts.inbox, counts=parts.pool.counts, clock=time.monotonic)
            self._loops.append(loop)
            thread.begin(partial(self._step, loop))
        return [parts.info for parts in self._parts.values()]

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, salt: bytes) -> list[Answered]:
        """Submit all at once, greedy, `num_tokens` each whatever they are; returns when the last token is here.

        Prompts share KV with those of equal `salt` only. Raises the first error that an engine has, and EngineFault
        when nothing happens for STALL_S.
        """
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        requests = [
            GenerateRequest(
                key=TransferKey(next(self._keys).to_bytes(16, "big")),
                prompt=tuple(prompt),
                sampling=sampling,
                salt=salt,
            )
            for prompt in prompts
        ]
        answers = {request.key: Answered() for request in requests}
        batch = _Batch(time.perf_counter(), answers, {(key, role) for key in answers for role in self._parts})
        self._batch = batch
        for request in requests:
            self._submit(request)
        seen = -1
        while not batch.done.wait(STALL_S):
            if batch.progress == seen:
                raise EngineFault(f"no token in {STALL_S:g} s", detail=f"{len(batch.open)} phases are open")
            seen = batch.progress
        if batch.failure is not None:
            raise batch.failure
        return list(answers.values())

    def stop(self) -> None:
        """End threads, drivers and servers."""
        for loop in self._loops:
            loop.stop()
        self._in_asyncio(self._unlisten())
        for parts in self._parts.values():
            if parts.sender is not None:
                parts.sender.stop()
            if parts.receiver is not None:
                parts.receiver.stop()
        for thread in self._step_threads:
            thread.end(STOP_TIMEOUT_S)
        self._asyncio.call_soon_threadsafe(self._asyncio.stop)
        self._asyncio_thread.join(STOP_TIMEOUT_S)
        self._parts.clear()

    def _brain(self, spec: EngineSpec) -> BrainFactory:
        return brain_of(spec) if self._random_seed is None else partial(model_brain, random_seed=self._random_seed)

    def _submit(self, request: GenerateRequest) -> None:
        decode, prefill = self._parts[Role.DECODE], self._parts.get(Role.PREFILL)
        taken = decode.inbox.try_put(DecodeOrder(request=request, prefill=prefill.info.ref if prefill else None))
        if prefill is not None:
            taken &= prefill.inbox.try_put(PrefillOrder(request=request, decode=decode.info.ref))
        if not taken:
            raise Overloaded("the engine takes no more requests: raise max_waiting of its pool")

    def _drain(self, parts: EngineParts) -> None:
        outputs, _ = parts.outbox.drain()
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
            server = grpc.aio.server(options=SERVER_OPTIONS)
            parts.sender.attach(server)
            server.add_insecure_port(parts.info.ref.target)
            await server.start()
            self._servers.append(server)

    async def _unlisten(self) -> None:
        for server in self._servers:
            await server.stop(0.2)

    def _step(self, loop: StepLoop) -> None:
        try:
            loop.run()
        except BaseException as exc:
            if self._batch is not None:
                self._batch.fail(exc)
            raise

    def _run_asyncio(self) -> None:
        asyncio.set_event_loop(self._asyncio)
        try:
            self._asyncio.run_forever()
        finally:
            self._asyncio.close()

    def _in_asyncio(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._asyncio).result(STOP_TIMEOUT_S)
