"""Router.embed: from texts in token ids to their numbers: admission, an engine by load, one more where one is lost.

Called by Router for cluster/api. A request goes to one engine whole; the engine computes it beside others.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry import trace

from diptych.cluster.observability.tracing import context_from, traceparent_of
from diptych.protos import engine_pb2 as pb
from diptych.protos.embedding import EmbedKind, EmbedOrder, EmbedTimes, TextRow, order_to_pb, values_of
from diptych.protos.errors import (
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    EngineError,
    EngineLost,
    Fenced,
    ShuttingDown,
)
from diptych.protos.types import (
    EngineRef,
    Finish,
    GenerateRequest,
    PromptLogprobs,
    Role,
    SamplingParams,
    TokenLogprobs,
    TransferKey,
)

from .life import Life, State
from .registry import TrackedRequest
from .session import EngineSession

if TYPE_CHECKING:
    from .router import Router

MAX_LOSSES = 1  # engines that a request may lose: the second one is its answer
MAX_ELSEWHERE = 5  # engines that are full or go, and are asked in vain
INLINE_TOKENS = 32 << 10  # larger orders are written in a thread: so many take a millisecond
_PATH = "embed"
_OURS = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL})
_TRACER = trace.get_tracer("diptych.router")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCall:
    """One request. `timeout_s` counts from `arrived_at`; None leaves the router's own limit. See EmbedOrder."""

    model: str
    kind: EmbedKind
    rows: tuple[TextRow, ...]
    skip: int = 0
    dimensions: int = 0
    timeout_s: float | None = None
    arrived_at: float | None = None  # on the router's clock; None: at the call
    traceparent: str = ""
    priority: int = 0
    tenant: str = ""
    tracked: TrackedRequest | None = None  # the request that clients may ask about


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedAnswer:
    """`values`: of each text, of each but the first where the kind is similarities. Times in seconds."""

    values: list[array[float]]
    engine: str
    attempts: int
    queue_s: float  # for a place in the router
    times: EmbedTimes  # on the engine
    total_s: float


@dataclass(slots=True)
class _Tries:
    """Of one request."""

    count: int = 0
    losses: int = 0
    elsewhere: int = 0  # engines that were full or went
    avoid: set[EngineRef] = field(default_factory=set)  # those that failed


class Embedding:
    """One per router, one event loop."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._tokens: Counter[EngineRef] = Counter()  # in work for this router, by engine

    async def run(self, call: EmbedCall) -> EmbedAnswer:
        """The answer. Raises Overloaded, DeadlineExceeded, Cancelled when it is cancelled by its id, EngineLost, and
        what the engine says of the request.
        """
        router, clock = self._router, self._router.clock
        span = _TRACER.start_span("router", context_from(call.traceparent), attributes={"model": call.model})
        arrived_at = clock() if call.arrived_at is None else call.arrived_at
        _, life = router.requests.begin(call.tracked, model=call.model, born=arrived_at)
        life.num_prompt_tokens = sum(len(row.ids) for row in call.rows)
        request = self._request(call, arrived_at, traceparent_of(span) or call.traceparent)
        failure: BaseException = GeneratorExit()  # nobody waits any more, unless something else ends it
        try:
            life.enter(State.QUEUED)
            with life.interrupts:
                await router.admission.enter(request)
            router.recovery.budget.admitted(call.tenant)
            queued_s, began = life.enter(State.PLACING) - arrived_at, clock()
            in_flight = router.metrics.gauges["in_flight"].labels(call.model)
            in_flight.inc()
            try:
                with life.interrupts:
                    answer = await self._attempts(call, request, life, queued_s)
            finally:
                in_flight.dec()
                router.admission.leave(request, num_tokens=0, duration_s=clock() - began)
            life.end()
            return answer
        except Exception as exc:
            failure = exc
            span.record_exception(exc)
            raise
        finally:
            life.end(failure)
            self._count(call, life, arrived_at)
            if span.is_recording():
                span.set_attribute("outcome", life.outcome)
                span.set_attributes({"prompt_tokens": life.num_prompt_tokens, "texts": len(call.rows)})
            span.end()

    def _tenant(self, call: EmbedCall) -> str:
        return call.tenant if call.tenant in self._router.settings.tenants else "other"

    def _count(self, call: EmbedCall, life: Life, arrived_at: float) -> None:
        metrics, tenant = self._router.metrics, self._tenant(call)
        metrics.counters["requests"].labels(call.model, tenant, life.outcome).inc()
        if life.entered(State.PLACING) is not None:
            metrics.histograms["prompt_tokens"].labels(call.model).observe(life.num_prompt_tokens)
            seconds = self._router.clock() - arrived_at
            metrics.histograms["e2e"].labels(call.model, tenant, _PATH if life.num_placements else "").observe(seconds)

    def _request(self, call: EmbedCall, arrived_at: float, traceparent: str) -> GenerateRequest:
        """What admission judges by: as many tokens as all texts have, whichever they are."""
        router = self._router
        limit = router.settings.limits.request_timeout_s
        timeout_s = limit if call.timeout_s is None else min(call.timeout_s, limit)
        known = router.settings.tenants.get(call.tenant)
        return GenerateRequest(
            key=TransferKey(router.new_id()),
            prompt=(0,) * sum(len(row.ids) for row in call.rows),
            sampling=SamplingParams(max_tokens=1),
            deadline=arrived_at + timeout_s,
            traceparent=traceparent,
            priority=call.priority,
            tenant=call.tenant,
            weight=known.weight if known is not None else 1.0,
        )

    async def _attempts(self, call: EmbedCall, request: GenerateRequest, life: Life, queued_s: float) -> EmbedAnswer:
        tries = _Tries()
        while True:
            session = await self._place(call, request, tries)
            tries.count += 1
            ref = session.info.ref
            life.placed("", ref.engine_id, _PATH)
            try:
                values, times = await self._ask(session, call, request)
            except DiptychError as exc:
                if not self._goes_on(call, tries, ref, exc):
                    raise
                self._router.metrics.counters["retries"].labels(call.model, exc.code).inc()
                life.moving(exc.code)
                continue
            total_s = self._router.clock() - life.born
            return EmbedAnswer(
                values=values,
                engine=ref.engine_id,
                attempts=tries.count,
                queue_s=queued_s,
                times=times,
                total_s=total_s,
            )

    def _goes_on(self, call: EmbedCall, tries: _Tries, ref: EngineRef, error: DiptychError) -> bool:
        """Whether another engine is asked after one has failed. A loss is paid for; an engine that goes is not."""
        tries.avoid.add(ref)
        if isinstance(error, EngineLost):
            tries.losses += 1
            return tries.losses <= MAX_LOSSES and self._router.recovery.budget.try_take(call.tenant)
        tries.elsewhere += 1
        if tries.elsewhere > MAX_ELSEWHERE:
            return False
        if isinstance(error, ShuttingDown | Fenced):
            return True
        return isinstance(error, CapacityError) and bool(self._live(call.model, tries.avoid))

    async def _place(self, call: EmbedCall, request: GenerateRequest, tries: _Tries) -> EngineSession:
        """The engine with the fewest tokens to compute; waits for one as long as dialling may take."""
        router, view = self._router, self._router.view
        assert request.deadline is not None
        began = router.clock()
        give_up = min(request.deadline, began + router.settings.connect_timeout_s)
        while True:
            found = self._live(call.model, tries.avoid)
            if found:
                return found[0]
            left = give_up - router.clock()
            if left <= 0 or view.is_stopped or not (tries.count or view.expects(call.model)):
                break
            await view.wait_change(left)
        if self._live(call.model, set()):  # those that were asked in vain are better than none
            return self._live(call.model, set())[0]
        if router.clock() >= request.deadline:
            raise DeadlineExceeded("the request's deadline passed before an engine could take it")
        raise EngineLost(f"no engine of {call.model} is reachable")

    def _live(self, model: str, avoid: set[EngineRef]) -> list[EngineSession]:
        """Engines that take requests of a model, the least busy first."""
        view = self._router.view
        refs = [load.ref for load in view.live(model, Role.EMBED) if load.ref not in avoid]
        sessions = [session for ref in refs if (session := view.session(ref)) is not None]
        return sorted(sessions, key=self._rank)

    def _rank(self, session: EngineSession) -> tuple[float, int, str]:
        reported = session.status.counters.get("embed_queued_tokens", 0.0)
        own = self._tokens[session.info.ref]
        return max(float(own), reported), session.in_flight, session.info.ref.engine_id

    async def _ask(
        self, session: EngineSession, call: EmbedCall, request: GenerateRequest
    ) -> tuple[list[array[float]], EmbedTimes]:
        """One engine's answer. Raises EngineLost, DeadlineExceeded, and what the engine says."""
        ref, clock = session.info.ref, self._router.clock
        order = EmbedOrder(
            kind=call.kind,
            rows=call.rows,
            skip=call.skip,
            dimensions=call.dimensions,
            deadline=request.deadline,
            traceparent=request.traceparent,
            priority=request.priority,
            tenant=request.tenant,
            weight=request.weight,
        )
        assert request.deadline is not None
        if len(request.prompt) <= INLINE_TOKENS:
            message = order_to_pb(order, clock(), ref.epoch)
        else:
            message = await asyncio.to_thread(order_to_pb, order, clock(), ref.epoch)
        loss = _Loss(asyncio.get_running_loop().create_future())
        rpc = session.embed(message)
        handle = session.attach(Role.EMBED, request.key, loss)
        reader = asyncio.create_task(_read(rpc))
        self._tokens[ref] += len(request.prompt)
        try:
            left = max(request.deadline - clock(), 0.0)
            ends: set[asyncio.Future[Any]] = {reader, loss.told}
            await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not reader.done() and not loss.told.done():
                raise DeadlineExceeded("the request's deadline passed while its texts were computed")
            # gRPC cancels the calls of a connection that closes: that is no wish of ours.
            if not reader.done() or reader.cancelled():
                raise EngineLost(f"the connection to engine {ref.engine_id} broke")
            num_values = len(call.rows) - (call.kind is EmbedKind.SIMILARITIES)
            return values_of(reader.result(), num_values)
        finally:
            self._tokens[ref] -= len(request.prompt)
            if not self._tokens[ref]:
                del self._tokens[ref]
            session.release(handle)
            rpc.cancel()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


async def _read(rpc: grpc.aio.UnaryStreamCall[pb.EmbedOrder, pb.EmbedPart]) -> list[pb.EmbedPart]:
    """All parts. Raises EngineLost, EngineError."""
    try:
        return [part async for part in rpc]
    except grpc.aio.AioRpcError as exc:
        if exc.code() in _OURS:
            raise EngineError("the engine could not take the request", f"{exc.code().name} {exc.details()}") from exc
        raise EngineLost("the connection to the engine broke", f"{exc.code().name} {exc.details()}") from exc


class _Loss:
    """A session's sink that hears of nothing but the engine's loss."""

    def __init__(self, told: asyncio.Future[None]) -> None:
        self.told = told

    def on_start(self) -> None:
        """Never: there is no order."""

    def on_token(self, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Never."""

    def on_prompt(self, piece: PromptLogprobs) -> None:
        """Never."""

    def on_end(self, role: Role, outcome: Finish | DiptychError) -> None:
        """The stream to the engine broke."""
        if not self.told.done():
            self.told.set_result(None)
