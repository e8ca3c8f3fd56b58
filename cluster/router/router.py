"""Router.generate: from a request in token ids to its tokens: admission, placement, engines, retries, metrics.

Called by cluster/api. Knows nothing of HTTP and text. Every call ends in one delta with `finish`, or in one exception.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace

from opentelemetry import trace

from diptych.cluster.config import RouterSettings
from diptych.cluster.observability.metrics import EngineReading, RouterMetrics
from diptych.cluster.observability.tracing import context_from, traceparent_of
from diptych.protos.errors import (
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    EngineLost,
    FirstTokenTimeout,
    TransferError,
)
from diptych.protos.fair_line import Place
from diptych.protos.faults import FaultPlan, Point
from diptych.protos.status import EngineDirectory
from diptych.protos.trust import ROUTER, Trust
from diptych.protos.types import ANSWERING, EngineRef, GenerateRequest, Role, TransferKey

from .admission import Admission
from .attempt import Attempt
from .call import Explanation, GenerateCall, Loss, TokenDelta
from .embedding import EmbedAnswer, EmbedCall, Embedding
from .estimate import PairMeter
from .faults import pass_point
from .mirror import PromptNames
from .placement import Ask, Decision, EngineLoad
from .policies.configured import placer_of
from .record import CallRecord
from .recovery import Recovery, Work
from .registry import Registry
from .session import EngineSession, SessionTerms
from .view import COMEBACK_S, ClusterView, SessionFactory

__all__ = ["Explanation", "GenerateCall", "Router", "TokenDelta"]

KEPT_EXPLANATIONS = 16
KEPT_LOSSES = 64
_TRACER = trace.get_tracer("diptych.router")


class Router:
    """One per process. `start` before the first call, `stop` after the last."""

    def __init__(
        self,
        *,
        directory: EngineDirectory,
        settings: RouterSettings,
        metrics: RouterMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        trust: Trust | None = None,
        connect: SessionFactory = EngineSession,
        faults: FaultPlan | None = None,
        is_strict: bool = False,
    ) -> None:
        """Without `trust` it reaches engines of this process only, or servers that ask for no proof. `rng` names the
        router and its requests: the operating system's, unless a run is to be repeated. `connect` makes the sessions.
        `is_strict`: a request's state that cannot follow the one before raises, as tests want it.
        """
        self.settings = settings
        self.metrics = metrics or RouterMetrics()
        self._rng = rng or random.SystemRandom()
        self.router_id = f"router-{self._rng.randbytes(6).hex()}"
        self.clock = clock
        self._faults = faults
        self.requests = Registry(self.metrics, clock=lambda: self.clock(), is_strict=is_strict)
        self._pairs = PairMeter()
        self._placer = placer_of(settings.placement, pairs=self._pairs, clock=clock)
        limits = settings.limits
        self.admission = Admission(
            max_running=limits.max_running, max_waiting=limits.max_waiting, clock=clock, room=self._room
        )
        self._last_room = limits.max_running
        terms = SessionTerms(
            router_id=self.router_id,
            connect_timeout_s=settings.connect_timeout_s,
            silence_s=settings.silence_s,
            faults=faults,
            clock=clock,
            trust=trust or Trust.alone(ROUTER),
        )
        self.view = ClusterView(directory, terms, on_loss=self._lost, connect=connect)
        self.recovery = Recovery(settings, view=self.view, metrics=self.metrics, clock=clock, rng=self._rng)
        self._embedding = Embedding(self)
        self.metrics.add_engines(self._readings)
        self.metrics.gauges["running_limit"].set_function(lambda: self.admission.max_running)
        self.metrics.gauges["waiting_limit"].set(limits.max_waiting)
        self.metrics.gauges["waiting"].set_function(lambda: self.admission.waiting)
        self._in_flight: dict[str, int] = {}
        self.recent: deque[Explanation] = deque(maxlen=KEPT_EXPLANATIONS)  # of answered requests, newest last
        self.losses: deque[Loss] = deque(maxlen=KEPT_LOSSES)  # of engines, newest last

    async def start(self) -> None:
        """Follow the directory and dial the engines."""
        await self.view.start()

    async def stop(self) -> None:
        """End all sessions; open requests fail with EngineLost."""
        await self.view.stop()

    def is_ready(self, model: str) -> bool:
        """Whether a request for `model` has a place to go now, and all engines that were asked for when the router
        began were seen once: before that a router that others send load to would know half of the pools.
        """
        return self.view.is_complete and any(self.view.live(model, role) for role in ANSWERING)

    def new_id(self) -> bytes:
        """16 bytes by which engines know a request."""
        return self._rng.randbytes(16)

    @property
    def in_flight(self) -> dict[str, int]:
        """Requests in work, by model."""
        return {model: count for model, count in self._in_flight.items() if count}

    async def embed(self, call: EmbedCall) -> EmbedAnswer:
        """The numbers of texts, see Embedding.run. Cancel the task to cancel: the engine is told."""
        self._in_flight[call.model] = self._in_flight.get(call.model, 0) + 1
        try:
            return await self._embedding.run(call)
        finally:
            self._in_flight[call.model] -= 1

    def check_room(self, model: str, tenant: str, priority: int) -> None:
        """Before a prompt is made of a request: raises what `generate` would raise for want of room, and counts it."""
        place = Place(arrival=0, priority=priority, tenant=tenant, weight=self._weight(tenant))
        try:
            self.admission.check(place)
        except CapacityError as exc:
            self.metrics.counters["decisions"].labels(model, "reject", exc.code).inc()
            self.metrics.counters["requests"].labels(model, self._label(tenant), exc.code).inc()
            raise

    async def generate(self, call: GenerateCall) -> AsyncGenerator[TokenDelta, bool | None]:
        """The answer's tokens as they come. Close the generator to cancel: both engines are told. Send True to end the
        answer after the tokens received so far (a stop string): the reply is the delta with `finish`.

        Raises Overloaded, OverShare, DeadlineExceeded, Quarantined, Cancelled when it is cancelled by its id, or what
        ended the last attempt. An attempt that fails after tokens were yielded is followed by one that goes on behind
        them: none is lost, none comes twice.
        """
        span = _TRACER.start_span("router", context_from(call.traceparent), attributes={"model": call.model})
        work = self._work(call, traceparent_of(span) or call.traceparent)
        record, life, failure = work.record, work.record.life, None
        first_token = self._watch_first_token(work)
        try:
            self.recovery.quarantine.check(call)
            with life.interrupts:
                await self._enter(work, span)
            self._in_flight[call.model] = self._in_flight.get(call.model, 0) + 1
            try:
                async with aclosing(self._attempts(work)) as deltas:
                    with life.interrupts:
                        delta = await anext(deltas)
                    if first_token is not None:
                        first_token.cancel()
                    while delta.finish is None:
                        told = yield delta
                        with life.interrupts:
                            delta = await deltas.asend(told)
                yield delta
            finally:
                self._in_flight[call.model] -= 1
                self.admission.leave(work.request, num_tokens=life.num_tokens, duration_s=record.working_s())
        except Exception as exc:
            failure = exc
            span.record_exception(exc)
            raise
        finally:
            if first_token is not None:
                first_token.cancel()
            record.close(span, failure)

    def _watch_first_token(self, work: Work) -> asyncio.TimerHandle | None:
        """Interrupts the call when the whole request has no token in time."""
        wanted = (work.call.first_token_timeout_s, self.settings.limits.first_token_timeout_s)
        limits = [limit for limit in wanted if limit is not None]
        if not limits or work.tracked.num_tokens:
            return None
        limit, life = min(limits), work.record.life

        def expire() -> None:
            if not work.tracked.num_tokens:
                words = f"no token came within first_token_timeout_s, {limit:g} s; the request was {life.state}"
                life.interrupts.fire(FirstTokenTimeout(words))

        return asyncio.get_running_loop().call_later(max(life.born + limit - self.clock(), 0), expire)

    async def _enter(self, work: Work, span: trace.Span) -> None:
        try:
            with _TRACER.start_span("queue", trace.set_span_in_context(span)):
                await self.admission.enter(work.request)
        except DiptychError as exc:
            work.record.refused(exc.code)
            raise
        work.record.admitted()
        self.recovery.budget.admitted(work.call.tenant)

    def _work(self, call: GenerateCall, traceparent: str) -> Work:
        tenant = self._label(call.tenant)
        arrived_at = self.clock() if call.arrived_at is None else call.arrived_at
        limit = self.settings.limits.request_timeout_s
        deadline = arrived_at + (limit if call.timeout_s is None else min(call.timeout_s, limit))
        tracked, life = self.requests.begin(call.tracked, model=call.model, born=arrived_at)
        record = CallRecord(self.metrics, call, life, tenant=tenant, clock=self.clock)
        request = GenerateRequest(
            key=TransferKey(self._rng.randbytes(16)),
            prompt=call.prompt,
            sampling=call.sampling,
            constraint=call.constraint,
            salt=call.salt,
            deadline=deadline,
            traceparent=traceparent,
            priority=call.priority,
            tenant=call.tenant,
            weight=self._weight(call.tenant),
        )
        ask = Ask(
            model=call.model,
            names=PromptNames(call.prompt, call.salt),
            session=(call.tenant, call.session) if call.session else None,
            reads_cache=call.sampling.prompt_logprobs is None,
        )
        return Work(call, request, ask, record, tracked, deadline, tenant)

    def _room(self) -> int:
        """What the engines can work on: more would wait there, where a router's own queue is fairer and tells it. Of
        engines that are all away for a moment the last number counts.
        """
        self._last_room = self.view.num_decoding() or self._last_room
        return self._last_room

    def _label(self, tenant: str) -> str:
        return tenant if tenant in self.settings.tenants else "other"

    def _weight(self, tenant: str) -> float:
        known = self.settings.tenants.get(tenant)
        return known.weight if known is not None else 1.0

    async def _attempts(self, work: Work) -> AsyncGenerator[TokenDelta, bool | None]:
        record, sampling, recovery = work.record, work.call.sampling, self.recovery
        while True:
            seat = await recovery.enter(work)
            try:
                attempt, decision = await self._place(work)
            except BaseException:
                seat.release()
                raise
            try:
                recovery.placed(work, attempt)
                seat.release_later()
                attempt.start(timeout_s=work.deadline - self.clock())
                while tokens := await attempt.next():
                    recovery.told(work, attempt, tokens)
                    if not work.is_unproven:
                        seat.release()
                    logprobs = None if sampling.logprobs is None else attempt.merge.take_logprobs(len(tokens))
                    prompt = None
                    if sampling.prompt_logprobs is not None and record.life.num_tokens == 0:
                        prompt = attempt.merge.prompt_logprobs
                    record.tokens(len(tokens))
                    if (yield TokenDelta(tokens, None, logprobs, prompt, decision.placement)):
                        attempt.stop(record.life.num_tokens)
                await attempt.linger()
                explanation = record.answered(attempt, decision)
                self._learn(work, explanation)
                self.recent.append(explanation)
                yield TokenDelta([], explanation, placement=decision.placement)
                return
            except DiptychError as exc:
                failure = exc
                if isinstance(exc, TransferError):  # who felled the prefill engine is known by that engine's end
                    await attempt.linger()
                recovery.failed(work, attempt)
            finally:
                attempt.close()
                seat.release()
                recovery.closed(work, attempt)
            await recovery.prepare(work, attempt, failure)
            work.request = self._resumed(work)
            if work.emitted:
                work.ask = replace(work.ask, names=PromptNames(work.request.known, work.call.salt), reads_cache=True)

    def _resumed(self, work: Work) -> GenerateRequest:
        """The next attempt's: what the client has is known, and the prompt's logprobs are told."""
        request, sampling = work.request, work.request.sampling
        if work.emitted:
            sampling = replace(sampling, prompt_logprobs=None)
        key = replace(request.key, attempt=request.key.attempt + 1)
        return replace(request, key=key, sampling=sampling, resume=tuple(work.emitted))

    async def _place(self, work: Work) -> tuple[Attempt, Decision]:
        """Choose engines. Without any it waits as long as dialling may take, for the answer's rest as long as an engine
        may need to come back.
        """
        if self._faults is not None:
            await pass_point(self._faults, Point.ROUTER_PLACE)
        began, model = self.clock(), work.call.model
        patience = COMEBACK_S if work.emitted and self.view.expects(model) else self.settings.connect_timeout_s
        give_up = min(work.deadline, began + patience)
        while self.clock() < work.deadline:
            decision = self._choose(work)
            if decision is not None:
                work.record.placed(decision, began)
                return self._attempt(work, decision), decision
            left = give_up - self.clock()
            if left <= 0 or self.view.is_stopped or not (work.failures or self.view.expects(model)):
                break
            await self.view.wait_change(left)
        is_late = self.clock() >= work.deadline
        work.record.refused(DeadlineExceeded.code if is_late else EngineLost.code)
        if is_late:
            raise DeadlineExceeded("the request's deadline passed before an engine could take it")
        raise EngineLost(f"no decode engine of {model} is reachable")

    def _choose(self, work: Work) -> Decision | None:
        model = work.call.model
        decode = self.view.live(model, Role.DECODE)
        if not decode:
            return None
        return self._placer.place(
            work.ask,
            _without(self.view.live(model, Role.PREFILL), work.avoid),
            _without(decode, work.avoid) or decode,
            pin=work.call.pin,
            is_colocated=not self.view.has_pool(model, Role.PREFILL),
        )

    def _attempt(self, work: Work, decision: Decision) -> Attempt:
        placement = decision.placement
        decode = self.view.session(placement.decode)
        prefill = self.view.session(placement.prefill) if placement.prefill is not None else None
        assert decode is not None
        now, lacks = self.clock(), decision.lacks
        if prefill is not None:
            prefill.meter.reserve(now, prompt_tokens=lacks, kv_tokens=0)
        decode.meter.reserve(now, prompt_tokens=0 if prefill else lacks, kv_tokens=work.ask.names.num_tokens)
        is_last, is_suspect = self.recovery.is_last(work), bool(work.strikes)
        return Attempt(
            work.request,
            placement,
            prefill,
            decode,
            is_last=is_last,
            is_suspect=is_suspect,
            on_start=work.record.life.began,
        )

    def _lost(self, session: EngineSession) -> None:
        ref = session.info.ref
        self.metrics.counters["sessions_lost"].labels(ref.engine_id).inc()
        loss = Loss(engine=ref.engine_id, epoch=ref.epoch, at_unix=time.time(), cause=session.loss_cause)
        self.losses.append(loss)

    def _learn(self, work: Work, told: Explanation) -> None:
        if told.transfer_bytes:
            moved = len(work.request.known) - told.decode_cached_tokens
            self._pairs.learn(told.prefill_engine, told.decode_engine, moved, told.transfer_s)

    def _readings(self) -> Iterable[EngineReading]:
        for session in self.view.sessions():
            roles = "+".join(sorted(session.info.roles))
            yield EngineReading(session.info.ref.engine_id, roles, session.info.model, session.is_ready, session.status)


def _without(engines: list[EngineLoad], avoid: set[EngineRef]) -> list[EngineLoad]:
    return [engine for engine in engines if engine.ref not in avoid]
