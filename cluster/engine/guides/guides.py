"""Makes guides: compiles constraints in threads of its own, with a deadline, and keeps the last ones by their hash.

Called by the session in the asyncio thread; what it gives belongs to the step thread. Knows no workers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from diptych.protos.constraint import Backend as BackendName
from diptych.protos.constraint import Constraint, Guide
from diptych.protos.errors import DiptychError, EngineFault, InvalidRequest, Overloaded, ShuttingDown
from diptych.protos.lifecycle import logit_rules
from diptych.protos.ports import Clock
from diptych.protos.types import GenerateRequest

from .guide import RequestGuide
from .matcher import Backend, Compiled

COMPILE_TIMEOUT_S = 1.9  # and all of such a request less than 2
MAX_COMPILED = 256  # grammars kept
MAX_COMPILED_BYTES = 8 << 20  # of their texts, which what they compile to is in proportion to
MAX_COMPILING = 64  # at once; one more is refused
THREADS = {BackendName.LLGUIDANCE: 2, BackendName.XGRAMMAR: 1}  # xgrammar's process compiles one at a time

MadeT = TypeVar("MadeT")

log = logging.getLogger(__name__)


class Guides:
    """`backends`: by name, each made in a thread when it is first asked for, or by `warm_up`."""

    def __init__(
        self, backends: Mapping[BackendName, Callable[[], Backend]], *, end_tokens: Collection[int], clock: Clock
    ) -> None:
        self._factories = dict(backends)
        self._end_tokens = frozenset(end_tokens)
        self._clock = clock
        # One backend that is slow, or starts, keeps the other's grammars waiting no longer.
        self._pools = {name: ThreadPoolExecutor(THREADS[name], f"grammars-{name}") for name in backends}
        self._made: dict[BackendName, Future[Backend]] = {}
        self._compiled: OrderedDict[bytes, Compiled] = OrderedDict()
        self._sizes: dict[bytes, int] = {}
        self._bytes = 0
        self._compiling: dict[bytes, asyncio.Future[Compiled]] = {}
        self._seconds = 0.0
        self._totals = dict.fromkeys(("requests", "hits", "compiled", "refused", "timeouts"), 0)

    def warm_up(self, name: BackendName = BackendName.LLGUIDANCE) -> None:
        """Begin to make a backend; from the asyncio thread, or before there is one."""
        self._backend(name)

    async def open(self, request: GenerateRequest) -> Guide:
        """The guide of the request's constraint, which knows the tokens of `resume`.

        Raises InvalidRequest where the grammar cannot be compiled in time or does not allow what exists of the answer,
        Overloaded where too many others are compiled.
        """
        constraint = request.constraint
        assert constraint is not None
        compiled = await self._compile(constraint)
        return _foreseen(partial(self._begin, request, constraint, compiled))

    def _begin(self, request: GenerateRequest, constraint: Constraint, compiled: Compiled) -> Guide:
        sampling = request.sampling
        matcher = compiled.start()
        if constraint.prefix and not matcher.consume_text(constraint.prefix):
            raise InvalidRequest(
                "the beginning of the answer that was given does not have the form that the answer must have",
                "messages",
            )
        num_prompt = len(request.prompt)
        ends = sampling.stop_token_ids & self._end_tokens
        # Whoever asks for logprobs, or has rules of his own, has every token sampled.
        forces = sampling.logprobs is None and logit_rules(sampling, num_prompt) is None
        guide = RequestGuide(
            matcher, num_prompt=num_prompt, end_tokens=ends, forces=forces, reasoning=constraint.reasoning
        )
        for position, token in enumerate(request.resume, num_prompt):
            guide.accept(position, token)
        if guide.error is not None:
            raise EngineFault("the answer so far does not have the form that it must have", repr(guide.error))
        return guide

    def counters(self) -> dict[str, float]:
        """Totals, and what is kept as of now."""
        totals = {f"engine_grammars_{name}_total": float(value) for name, value in self._totals.items()}
        totals["engine_grammars_compile_seconds_total"] = self._seconds
        totals["engine_grammars_kept"] = float(len(self._compiled))
        return totals

    def close(self) -> None:
        """End the threads and what they started."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for made in self._made.values():
            made.add_done_callback(_close)  # at once, or when it is there

    async def _compile(self, constraint: Constraint) -> Compiled:
        self._totals["requests"] += 1
        key = hashlib.sha256(f"{constraint.backend}\0{constraint.grammar}".encode()).digest()
        if (compiled := self._compiled.get(key)) is not None:
            self._compiled.move_to_end(key)
            self._totals["hits"] += 1
            return compiled
        if (pending := self._compiling.get(key)) is None:
            if len(self._compiling) >= MAX_COMPILING:
                raise Overloaded(f"{MAX_COMPILING} grammars are being compiled")
            pending = self._compiling[key] = asyncio.ensure_future(self._compile_new(key, constraint))
            pending.add_done_callback(_look)  # whoever asked may be gone
        return await asyncio.shield(pending)

    async def _compile_new(self, key: bytes, constraint: Constraint) -> Compiled:
        try:
            backend = await asyncio.wrap_future(self._backend(constraint.backend))
            began = self._clock()
            job = self._submit(constraint.backend, partial(backend.compile, constraint.grammar))
            try:
                compiled = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(job)), COMPILE_TIMEOUT_S)
            except TimeoutError:
                raise self._late(job) from None
            self._seconds += self._clock() - began
        except DiptychError:
            self._totals["refused"] += 1
            raise
        finally:
            del self._compiling[key]
        self._totals["compiled"] += 1
        self._keep(key, compiled, len(constraint.grammar))
        return compiled

    def _late(self, job: Future[Compiled]) -> DiptychError:
        self._totals["timeouts"] += 1
        if job.cancel():  # it had not begun: those that come later do not wait behind it
            return Overloaded(f"other grammars have been compiled for {COMPILE_TIMEOUT_S:g} s")
        return InvalidRequest(
            f"the form of the answer took more than {COMPILE_TIMEOUT_S:g} s to compile; make it simpler"
        )

    def _keep(self, key: bytes, compiled: Compiled, size: int) -> None:
        self._compiled[key], self._sizes[key] = compiled, size
        self._bytes += size
        while len(self._compiled) > MAX_COMPILED or (self._bytes > MAX_COMPILED_BYTES and len(self._compiled) > 1):
            oldest, _ = self._compiled.popitem(last=False)
            self._bytes -= self._sizes.pop(oldest)

    def _backend(self, name: BackendName) -> Future[Backend]:
        if name not in self._factories:
            raise InvalidRequest(f"this engine has no grammar backend {name.value}")
        if name not in self._made or (self._made[name].done() and self._made[name].exception() is not None):
            self._made[name] = self._submit(name, self._factories[name])
        return self._made[name]

    def _submit(self, name: BackendName, make: Callable[[], MadeT]) -> Future[MadeT]:
        try:
            return self._pools[name].submit(_foreseen, make)
        except RuntimeError as exc:  # it takes nothing after `close`
            raise ShuttingDown("the engine is shutting down") from exc


def _foreseen(make: Callable[[], MadeT]) -> MadeT:
    """What `make` gives. Raises DiptychError alone: a library's panic is no Exception, and nobody would wait for it."""
    try:
        return make()
    except DiptychError:
        raise
    except BaseException as exc:
        log.error("a grammar could not be prepared", exc_info=exc)
        raise EngineFault("the form of the answer could not be prepared", repr(exc)) from exc


def _close(made: Future[Backend]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().close()


def _look(done: asyncio.Future[Compiled]) -> None:
    if not done.cancelled():
        done.exception()
