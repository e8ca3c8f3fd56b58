"""What a call leaves behind: its life, its metrics as they happen, its span, and in the end its Explanation.

One record per call, filled by the router. States and times are the life's. Knows no engine: it reads what an attempt
has collected.
"""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry import trace
from prometheus_client import Histogram

from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.types import Finish, FinishReason, Role

from .attempt import Attempt
from .call import Explanation, GenerateCall
from .life import Life, State
from .placement import Decision


class CallRecord:
    """`clock` in seconds. `tenant` is the label under which the call is counted. The life goes into the queue."""

    def __init__(
        self, metrics: RouterMetrics, call: GenerateCall, life: Life, *, tenant: str, clock: Callable[[], float]
    ) -> None:
        self.life = life
        self.queue_s = 0.0
        self.ttft_s = 0.0
        self.tries = 0  # further placements before the first token
        self.moves = 0  # and after it
        self._lost_code = ""  # its error, if the client had tokens by then
        self._cached: int | None = None  # prompt tokens in the caches of the first engines, once it was moved
        self._metrics = metrics
        self._call = call
        self._tenant = tenant
        self._clock = clock
        life.num_prompt_tokens = len(call.prompt)
        self._begin = life.enter(State.QUEUED)
        self._last = 0.0
        self._path = ""
        self._inter_token: Histogram | None = None
        self._explanation: Explanation | None = None

    def working_s(self) -> float:
        """Seconds since the call got its place."""
        admitted_at = self.life.entered(State.PLACING)
        return 0.0 if admitted_at is None else self._clock() - admitted_at

    def admitted(self) -> None:
        """The call got its place."""
        self.queue_s = self.life.enter(State.PLACING) - self._begin
        self._stage("queue", self.queue_s)
        self._metrics.gauges["in_flight"].labels(self._call.model).inc()
        self._metrics.histograms["prompt_tokens"].labels(self._call.model).observe(len(self._call.prompt))

    def placed(self, decision: Decision, began: float) -> None:
        """Engines were chosen in the seconds since `began`; they get their orders now."""
        placement = decision.placement
        prefill = "" if placement.prefill is None else placement.prefill.engine_id
        self.life.placed(prefill, placement.decode.engine_id, decision.path)
        self._stage("route", self._clock() - began)
        self._path = decision.path
        self._metrics.counters["decisions"].labels(self._call.model, decision.path, decision.reason).inc()
        self._inter_token = self._metrics.histograms["itl"].labels(self._call.model, self._tenant, self._path)
        if decision.reason == "no_prefill":
            self._metrics.counters["fallbacks"].labels(self._call.model, "no_prefill").inc()

    def refused(self, reason: str) -> None:
        """No engines were chosen."""
        self._metrics.counters["decisions"].labels(self._call.model, "reject", reason).inc()

    def interrupted(self, attempt: Attempt, code: str) -> None:
        """An attempt failed with `code`; another one may follow."""
        self.life.moving(code)
        if self.life.num_tokens:
            self._lost_code = code
            if self._cached is None:
                self._cached = _cached(*(_report(attempt, role) for role in (Role.PREFILL, Role.DECODE)))

    def again(self) -> None:
        """Another attempt does follow."""
        if self.life.num_tokens:
            self.moves += 1
        else:
            self.tries += 1

    def tokens(self, count: int) -> None:
        """So many tokens go to the client now."""
        life, before = self.life, self.life.num_tokens
        now = self._clock() if life.state is State.DECODING else self._decoding()
        life.num_tokens += count
        if before == 0:
            self.ttft_s = now - self._begin
            self._histogram("ttft", self.ttft_s)
        else:
            assert self._inter_token is not None
            self._inter_token.observe((now - self._last) / count)
        if before < 2 <= life.num_tokens:
            self._histogram("ttst", now - self._begin)
        self._last = now

    def _decoding(self) -> float:
        """The first token, or the first one after a failed attempt; gives the time."""
        decoded_at, failed_at = self.life.entered(State.DECODING), self.life.entered(State.MOVING)
        now = self.life.enter(State.DECODING)
        if failed_at is not None and (decoded_at is None or decoded_at <= failed_at):
            self._metrics.histograms["recovery"].labels(self._call.model).observe(now - failed_at)
            self._moved("done")
        return now

    def answered(self, attempt: Attempt, decision: Decision) -> Explanation:
        """The call has its whole answer."""
        explanation = self._explain(attempt, decision)
        self.life.end()
        self._moved("done")
        self._explanation = explanation
        model = self._call.model
        counters = self._metrics.counters
        for where, cached in (
            ("prefill", explanation.prefill_cached_tokens),
            ("decode", explanation.decode_cached_tokens),
        ):
            counters["prefix_hit_tokens"].labels(model, where).inc(cached)
        for role, times in (("prefill", explanation.prefill), ("decode", explanation.decode)):
            if role == "decode" or explanation.prefill_engine:
                self._stage(f"{role}_queue", times.queue)
        self._stage("prefill", explanation.prefill.prefill or explanation.decode.prefill)
        self._stage("decode", explanation.decode.decode)
        if explanation.transfer_bytes:
            transport = explanation.transport or "unknown"
            counters["kv_bytes"].labels(model, transport).inc(explanation.transfer_bytes)
            self._metrics.histograms["kv_seconds"].labels(model, transport).observe(explanation.transfer_s)
        elif explanation.prefill_engine and explanation.decode.prefill and not explanation.preemptions:
            counters["fallbacks"].labels(model, "transfer").inc()
        return explanation

    def close(self, span: trace.Span, error: BaseException | None) -> None:
        """The call is over, by `error` unless it was answered; None then means that nobody waits any more."""
        model, life = self._call.model, self.life
        life.end(error or GeneratorExit())
        if life.state is not State.CANCELLED:
            self._moved("failed")
        self._metrics.counters["requests"].labels(model, self._tenant, life.outcome).inc()
        if life.entered(State.PLACING) is not None:
            self._metrics.gauges["in_flight"].labels(model).dec()
            self._histogram("e2e", self._clock() - self._begin)
            self._metrics.histograms["output_tokens"].labels(model).observe(life.num_tokens)
        if span.is_recording():
            span.set_attributes({"outcome": life.outcome, "prompt_tokens": len(self._call.prompt)})
            span.set_attribute("output_tokens", life.num_tokens)
            told = self._explanation
            if told is not None:
                names = ("prefill_engine", "decode_engine", "attempts", "migrations", "cached_tokens")
                more = ("transfer_bytes", "transport", "path", "choice")
                span.set_attributes({name: getattr(told, name) for name in names + more})
        span.end()

    def _moved(self, outcome: str) -> None:
        """What was interrupted has come to something."""
        code, self._lost_code = self._lost_code, ""
        if code:
            self._metrics.counters["migrations"].labels(self._call.model, outcome, code).inc()

    def _histogram(self, name: str, seconds: float) -> None:
        self._metrics.histograms[name].labels(self._call.model, self._tenant, self._path).observe(seconds)

    def _stage(self, stage: str, seconds: float) -> None:
        self._metrics.histograms["stage"].labels(self._call.model, stage).observe(seconds)

    def _explain(self, attempt: Attempt, decision: Decision) -> Explanation:
        end = attempt.merge.finish
        assert end is not None
        prefill, decode = (_report(attempt, role) for role in (Role.PREFILL, Role.DECODE))
        placement = decision.placement
        return Explanation(
            reason=end.reason,
            num_tokens=end.num_tokens,
            cached_tokens=self._cached if self._cached is not None else _cached(prefill, decode),
            attempts=self.tries + 1,
            migrations=self.moves,
            policy=decision.policy,
            choice=decision.choice,
            path=decision.path,
            queue_s=self.queue_s,
            ttft_s=self.ttft_s,
            total_s=self._clock() - self._begin,
            prefill_engine=placement.prefill.engine_id if placement.prefill else "",
            decode_engine=placement.decode.engine_id,
            prefill_cached_tokens=prefill.cached_tokens,
            decode_cached_tokens=decode.cached_tokens,
            prefill=prefill.times,
            decode=decode.times,
            transfer_bytes=max(prefill.transfer_bytes, decode.transfer_bytes),
            transfer_s=prefill.times.transfer or decode.times.transfer,
            transport=decode.transport or prefill.transport,
            preemptions=prefill.preemptions + decode.preemptions,
        )


def _cached(prefill: Finish, decode: Finish) -> int:
    return max(prefill.cached_tokens, decode.cached_tokens if not decode.transfer_bytes else 0)


def _report(attempt: Attempt, role: Role) -> Finish:
    outcome = attempt.merge.over.get(role)
    if isinstance(outcome, Finish):
        return outcome
    return Finish(key=attempt.request.key, role=role, reason=FinishReason.CANCELLED)
