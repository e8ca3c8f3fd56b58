"""Batches through an engine's gRPC session, as a router sends them: from another process, through the router's own end
of the stream, without anything else that a router does. For `diptych bench offline --through session`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from diptych.cluster.router.session import EngineSession, SessionTerms
from diptych.protos.errors import DiptychError, EngineFault, EngineLost, error_from_code
from diptych.protos.status import EngineInfo
from diptych.protos.trust import ROUTER, Trust
from diptych.protos.types import (
    DecodeOrder,
    Finish,
    FinishReason,
    GenerateRequest,
    PromptLogprobs,
    Role,
    SamplingParams,
    TokenLogprobs,
    TransferKey,
)

_CONNECT_S = 30.0
_SILENCE_S = 60.0  # an engine that traces steps, or whose machine is busy, is no lost engine here
_POLL_S = 0.2
_END_S = 10.0
_AT_ONCE = 32  # orders
_ENDED = "the process with the session's client has ended"


@dataclass(frozen=True, slots=True)
class Batch:
    """What the client is told to send, all at once; greedy, `num_tokens` each whatever they are."""

    prompts: Sequence[Sequence[int]]
    num_tokens: int
    salt: bytes


@dataclass(slots=True)
class Received:
    """One request of a batch; its times are seconds since the batch began. `failure` is empty where there was none."""

    num_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    cached_tokens: int = 0
    failure: str = ""


class SessionClient:
    """A process with one session to the engine. `run` any number of times between enter and exit."""

    def __init__(self, info: EngineInfo, secret: bytes, lost: Callable[[], BaseException | None]) -> None:
        """`secret`: the engine's. `lost`: what ended the engine, asked for while a batch is under way."""
        spawn = multiprocessing.get_context("spawn")  # the engine's threads would not survive a fork
        self._ours, theirs = spawn.Pipe()
        self._theirs: Connection | None = theirs
        self._lost = lost
        arguments = (theirs, info, secret)
        self._process = spawn.Process(target=_serve_batches, args=arguments, name="session client", daemon=True)

    def __enter__(self) -> SessionClient:
        self._process.start()
        if self._theirs is not None:
            self._theirs.close()  # so that the end of the process is the end of the pipe
            self._theirs = None
        try:
            self._answer()  # connected
        except BaseException:
            self._process.kill()  # it goes on dialling
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._ours.close()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def run(self, batch: Batch) -> list[Received]:
        """Raises EngineFault with what went wrong first, and what ended the engine: then the client has ended, too."""
        try:
            self._ours.send(batch)
            found: list[Received] = self._answer()
        except BaseException as exc:
            self._process.kill()  # it waits for tokens that nobody sends any more
            if isinstance(exc, ConnectionError):
                raise EngineFault(_ENDED) from exc
            raise
        if failed := [one.failure for one in found if one.failure]:
            raise EngineFault(failed[0])
        return found

    def _answer(self) -> Any:
        while not self._ours.poll(_POLL_S):
            failure = self._lost()
            if failure is not None:
                raise failure
        try:
            answer = self._ours.recv()
        except EOFError:
            raise EngineFault(_ENDED) from None
        if isinstance(answer, str):
            raise EngineFault(answer)
        return answer


# ---- the other process ------------------------------------------------------------------------


@dataclass(slots=True)
class _Open:
    """A batch under way."""

    began: float
    left: int
    done: asyncio.Event = field(default_factory=asyncio.Event)


class _Counter:
    """The sink of one request."""

    def __init__(self, batch: _Open) -> None:
        self.received = Received()
        self._batch = batch

    def on_token(self, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """See router.session.Sink."""
        now = time.perf_counter() - self._batch.began
        received = self.received
        if received.num_tokens == 0:
            received.first_token_s = now
        received.num_tokens = index + 1
        received.last_token_s = now

    def on_start(self) -> None:
        """See Sink: nobody here asks."""

    def on_prompt(self, piece: PromptLogprobs) -> None:
        """Nobody asks for them."""

    def on_end(self, role: Role, outcome: Finish | DiptychError) -> None:
        """See router.session.Sink."""
        if isinstance(outcome, DiptychError):
            self.received.failure = outcome.message
        else:
            self.received.cached_tokens = outcome.cached_tokens
            if outcome.reason is FinishReason.ERROR:
                error = error_from_code(outcome.error_code, outcome.error_message)
                self.received.failure = error.message
        self._batch.left -= 1
        if self._batch.left == 0:
            self._batch.done.set()


def _serve_batches(pipe: Connection, info: EngineInfo, secret: bytes) -> None:
    try:
        asyncio.run(_client(pipe, info, Trust(secret, ROUTER)))
    except DiptychError as exc:
        pipe.send(exc.message)


async def _client(pipe: Connection, info: EngineInfo, trust: Trust) -> None:
    changed = asyncio.Event()
    terms = SessionTerms(
        router_id="bench",
        connect_timeout_s=_CONNECT_S,
        silence_s=_SILENCE_S,
        clock=time.monotonic,
        trust=trust,
    )
    session = EngineSession(info, terms, on_change=changed.set)
    session.start()
    try:
        async with asyncio.timeout(_CONNECT_S):
            await changed.wait()
        pipe.send(None)
        first_key = 1
        while (batch := await asyncio.to_thread(_next_batch, pipe)) is not None:
            pipe.send(await _run(session, batch, first_key))
            first_key += len(batch.prompts)
    except TimeoutError:
        raise EngineLost(f"no session with the engine within {_CONNECT_S:g} s") from None
    finally:
        await session.stop()


def _next_batch(pipe: Connection) -> Batch | None:
    try:
        batch: Batch = pipe.recv()
    except EOFError:
        return None
    return batch


async def _run(session: EngineSession, batch: Batch, first_key: int) -> list[Received]:
    sampling = SamplingParams(max_tokens=batch.num_tokens, temperature=0.0)
    orders = [
        DecodeOrder(
            request=GenerateRequest(
                key=TransferKey(b"session " + number.to_bytes(8, "big")),
                prompt=tuple(prompt),
                sampling=sampling,
                salt=batch.salt,
            ),
            prefill=None,
        )
        for number, prompt in enumerate(batch.prompts, first_key)
    ]
    open_ = _Open(time.perf_counter(), len(orders))
    counters = [_Counter(open_) for _ in orders]
    for at, (order, counter) in enumerate(zip(orders, counters, strict=True), 1):
        session.submit(order, counter)
        if at % _AT_ONCE == 0:
            await asyncio.sleep(0)  # the stream is written in between: the first need not wait for the last
    await open_.done.wait()
    return [counter.received for counter in counters]
