"""Router.generate: from a request in token ids to its tokens: admission, placement, engines, retries, metrics.

Called by cluster/api. Knows nothing of HTTP and text. Every call ends in one delta with `finish`, or in one exception.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace

from opentelemetry import trace

from diptych.cluster.config import RouterSettings
from diptych.cluster.observability.metrics import EngineReading, RouterMetrics
from diptych.cluster.observability.tracing import context_from, traceparent_of
from diptych.protos.errors import (
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    EngineLost,
    Overloaded,
)
from diptych.protos.status import EngineDirectory
from diptych.protos.types import Finish, FinishReason, GenerateRequest, Role, SamplingParams, StageTimes, TransferKey

from .admission import Admission
from .attempt import Attempt
from .placement import LeastLoad, Placement, PlacementPolicy
from .view import ClusterView

KEPT_EXPLANATIONS = 16
_TRACER = trace.get_tracer("diptych.router")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One request in token ids. `timeout_s` counts from the call; None leaves the router's own limit."""

    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    salt: bytes = b""
    timeout_s: float | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How a request was answered. Times in seconds, as each engine reported them."""

    reason: FinishReason
    num_tokens: int
    cached_tokens: int
    attempts: int
    queue_s: float
    prefill_engine: str
    decode_engine: str
    prefill: StageTimes
    decode: StageTimes
    transfer_bytes: int
    transport: str


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens, in order. The last delta has no tokens and the one `finish`."""

    tokens: list[int]
    finish: Explanation | None = None


class Router:
    """One per process. `start` before the first call, `stop` after the last."""

    def __init__(
        self,
        *,
        directory: EngineDirectory,
        settings: RouterSettings,
        metrics: RouterMetrics | None = None,
        policy: PlacementPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.settings = settings
        self.metrics = metrics or RouterMetrics()
        self.router_id = f"router-{entropy(6).hex()}"
        self._policy = policy or LeastLoad()
        self._clock = clock
        self._entropy = entropy
        limits = settings.limits
        self.admission = Admission(max_running=limits.max_running, max_waiting=limits.max_waiting, clock=clock)
        self.view = ClusterView(
            directory,
            router_id=self.router_id,
            connect_timeout_s=settings.connect_timeout_s,
            clock=clock,
            on_loss=lambda engine: self.metrics.counters["sessions_lost"].labels(engine).inc(),
        )
        self.metrics.add_engines(self._readings)
        self.metrics.gauges["running_limit"].set(limits.max_running)
        self.metrics.gauges["waiting_limit"].set(limits.max_waiting)
        self.metrics.gauges["waiting"].set_function(lambda: self.admission.waiting)
        self._in_flight: dict[str, int] = {}
        self.recent: deque[Explanation] = deque(maxlen=KEPT_EXPLANATIONS)  # of answered requests, newest last

    async def start(self) -> None:
        """Follow the directory and dial the engines."""
        await self.view.start()

    async def stop(self) -> None:
        """End all sessions; open requests fail with EngineLost."""
        await self.view.stop()

    def is_ready(self, model: str) -> bool:
        """Whether a request for `model` has a place to go now."""
        return bool(self.view.live(model, Role.DECODE))

    @property
    def in_flight(self) -> dict[str, int]:
        """Requests in work, by model."""
        return {model: count for model, count in self._in_flight.items() if count}

    async def generate(self, call: GenerateCall) -> AsyncGenerator[TokenDelta, bool | None]:
        """The answer's tokens as they come. Close the generator to cancel: both engines are told. Send True to end the
        answer after the tokens received so far (a stop string): the reply is the delta with `finish`.

        Raises Overloaded, DeadlineExceeded, or what ended the last attempt; a retry is tried only while nothing was
        yielded.
        """
        limit = self.settings.limits.request_timeout_s
        timeout_s = limit if call.timeout_s is None else min(call.timeout_s, limit)
        deadline = self._clock() + timeout_s
        span = _TRACER.start_span("router", context_from(call.traceparent), attributes={"model": call.model})
        record = _Record(self.metrics, call, self._clock)
        try:
            with _TRACER.start_span("queue", trace.set_span_in_context(span)):
                await self.admission.enter(deadline)
            record.admitted()
            self._in_flight[call.model] = self._in_flight.get(call.model, 0) + 1
            try:
                async with aclosing(self._attempts(call, deadline, span, record)) as deltas:
                    delta = await anext(deltas)
                    while delta.finish is None:
                        delta = await deltas.asend((yield delta))
                yield delta
            finally:
                self._in_flight[call.model] -= 1
                self.admission.leave(record.age_s())
        except Exception as exc:
            record.outcome = exc.code if isinstance(exc, DiptychError) else DiptychError.code
            span.record_exception(exc)
            raise
        finally:
            record.close(span)

    async def _attempts(
        self, call: GenerateCall, deadline: float, span: trace.Span, record: _Record
    ) -> AsyncGenerator[TokenDelta, bool | None]:
        request = GenerateRequest(
            key=TransferKey(self._entropy(16)),
            prompt=call.prompt,
            sampling=call.sampling,
            salt=call.salt,
            deadline=deadline,
            traceparent=traceparent_of(span) or call.traceparent,
        )
        avoid: set[str] = set()
        while True:
            attempt = await self._place(request, call.model, avoid, deadline)
            try:
                attempt.start(timeout_s=deadline - self._clock())
                while tokens := await attempt.next():
                    record.tokens(len(tokens))
                    if (yield TokenDelta(tokens)):
                        attempt.stop(record.num_tokens)
                await attempt.linger()
                explanation = _explain(attempt, record.queue_s)
                record.finished(explanation)
                self.recent.append(explanation)
                yield TokenDelta([], explanation)
                return
            except DiptychError as exc:
                avoid.add(attempt.placement.decode.engine_id)
                if record.num_tokens or not self._may_retry(exc, call.model, request.key.attempt, avoid):
                    raise
                self.metrics.counters["retries"].labels(call.model, exc.code).inc()
                key = replace(request.key, attempt=request.key.attempt + 1)
                request = replace(request, key=key)
            finally:
                attempt.close()

    def _may_retry(self, error: DiptychError, model: str, attempt: int, avoid: set[str]) -> bool:
        if not error.retryable or attempt + 1 >= self.settings.max_attempts:
            return False
        if isinstance(error, CapacityError):  # asking the same full engine again at once only adds load
            return any(engine.ref.engine_id not in avoid for engine in self.view.live(model, Role.DECODE))
        return True

    async def _place(self, request: GenerateRequest, model: str, avoid: set[str], deadline: float) -> Attempt:
        """Choose engines; after a loss, wait for one to come back as long as dialling may take."""
        give_up = min(deadline, self._clock() + self.settings.connect_timeout_s)
        while True:
            placement = self._choose(model, avoid)
            if placement is not None:
                decode = self.view.session(placement.decode)
                prefill = self.view.session(placement.prefill) if placement.prefill is not None else None
                assert decode is not None
                return Attempt(request, placement, prefill, decode)
            left = give_up - self._clock()
            if request.key.attempt == 0 or left <= 0:
                break
            await self.view.wait_change(left)
        if not any(session.info.model == model for session in self.view.sessions()):
            raise Overloaded(f"no engine serves {model} now", self.settings.connect_timeout_s)
        if self._clock() >= deadline:
            raise DeadlineExceeded("the request's deadline passed while no engine was reachable")
        raise EngineLost(f"no decode engine of {model} is reachable")

    def _choose(self, model: str, avoid: set[str]) -> Placement | None:
        decode = self.view.live(model, Role.DECODE)
        if not decode:
            return None
        fresh = [engine for engine in decode if engine.ref.engine_id not in avoid]
        return self._policy.choose(self.view.live(model, Role.PREFILL), fresh or decode)

    def _readings(self) -> Iterable[EngineReading]:
        for session in self.view.sessions():
            roles = "+".join(sorted(session.info.roles))
            yield EngineReading(session.info.ref.engine_id, roles, session.info.model, session.is_ready, session.status)


def _explain(attempt: Attempt, queue_s: float) -> Explanation:
    end = attempt.merge.finish
    assert end is not None
    prefill, decode = (_report(attempt, role) for role in (Role.PREFILL, Role.DECODE))
    placement = attempt.placement
    return Explanation(
        reason=end.reason,
        num_tokens=end.num_tokens,
        cached_tokens=max(prefill.cached_tokens, decode.cached_tokens if not decode.transfer_bytes else 0),
        attempts=attempt.request.key.attempt + 1,
        queue_s=queue_s,
        prefill_engine=placement.prefill.engine_id if placement.prefill else "",
        decode_engine=placement.decode.engine_id,
        prefill=prefill.times,
        decode=decode.times,
        transfer_bytes=max(prefill.transfer_bytes, decode.transfer_bytes),
        transport=decode.transport or prefill.transport,
    )


def _report(attempt: Attempt, role: Role) -> Finish:
    outcome = attempt.merge.over.get(role)
    if isinstance(outcome, Finish):
        return outcome
    return Finish(key=attempt.request.key, role=role, reason=FinishReason.CANCELLED)


class _Record:
    """One call's times and counts, written to the metrics as they happen and to the span at the end."""

    def __init__(self, metrics: RouterMetrics, call: GenerateCall, clock: Callable[[], float]) -> None:
        self.outcome = "cancelled"  # unless something else ends the call
        self.num_tokens = 0
        self.queue_s = 0.0
        self._metrics = metrics
        self._call = call
        self._clock = clock
        self._begin = self._start = clock()
        self._last = 0.0
        self._is_admitted = False
        self._inter_token = metrics.histograms["inter_token"].labels(call.model)
        self._explanation: Explanation | None = None

    def age_s(self) -> float:
        return self._clock() - self._start

    def admitted(self) -> None:
        self._is_admitted = True
        self._start = self._clock()
        self.queue_s = self._start - self._begin
        self._metrics.histograms["queue"].labels(self._call.model).observe(self.queue_s)
        self._metrics.gauges["in_flight"].labels(self._call.model).inc()
        self._metrics.histograms["prompt_tokens"].labels(self._call.model).observe(len(self._call.prompt))

    def tokens(self, count: int) -> None:
        now = self._clock()
        if self.num_tokens == 0:
            self._metrics.histograms["ttft"].labels(self._call.model).observe(now - self._start)
        else:
            self._inter_token.observe((now - self._last) / count)
        self._last = now
        self.num_tokens += count

    def finished(self, explanation: Explanation) -> None:
        self.outcome = "ok"
        self._explanation = explanation
        counters, model = self._metrics.counters, self._call.model
        counters["cached_tokens"].labels(model).inc(explanation.cached_tokens)
        if explanation.transfer_bytes:
            counters["kv_bytes"].labels(model, explanation.transport or "unknown").inc(explanation.transfer_bytes)

    def close(self, span: trace.Span) -> None:
        model = self._call.model
        self._metrics.counters["requests"].labels(model, self.outcome).inc()
        if self._is_admitted:
            self._metrics.gauges["in_flight"].labels(model).dec()
            self._metrics.histograms["e2e"].labels(model).observe(self.age_s())
            self._metrics.histograms["output_tokens"].labels(model).observe(self.num_tokens)
        if span.is_recording():
            span.set_attributes({"outcome": self.outcome, "prompt_tokens": len(self._call.prompt)})
            span.set_attribute("output_tokens", self.num_tokens)
            if self._explanation is not None:
                span.set_attributes(
                    {
                        "prefill_engine": self._explanation.prefill_engine,
                        "decode_engine": self._explanation.decode_engine,
                        "attempts": self._explanation.attempts,
                        "cached_tokens": self._explanation.cached_tokens,
                        "transfer_bytes": self._explanation.transfer_bytes,
                        "transport": self._explanation.transport,
                    }
                )
        span.end()
