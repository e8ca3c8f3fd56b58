"""The parts of a request's life that are the same in both workers: refusal, row, step, end, times, deadlines.

Pure but for `execute`, which drives a Runner. Called by the workers from the step thread; knows no states, no queues.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from typing import Literal

from .errors import ContextTooLong, DiptychError, EngineFault, InvalidRequest
from .ports import Runner
from .step import SampleSpec, StepPlan, StepResult, StepRow
from .types import FinishReason, GenerateRequest, SamplingParams, StageTimes, TransferKey

log = logging.getLogger(__name__)

Stage = Literal["queue", "prefill", "transfer", "decode"]


def refusal(request: GenerateRequest, max_context_tokens: int) -> DiptychError | None:
    """Why no engine of this model can take the request, or None."""
    if not request.prompt:
        return InvalidRequest("the prompt has no tokens", "prompt")
    if len(request.prompt) >= max_context_tokens:
        return ContextTooLong(
            f"the prompt has {len(request.prompt)} tokens: "
            f"the context of {max_context_tokens} tokens leaves no room for an answer"
        )
    return None


def finish_reason(
    sampling: SamplingParams, token: int, *, num_generated: int, num_prompt: int, max_context_tokens: int
) -> FinishReason | None:
    """Whether `token`, the last of `num_generated`, ends the request. Both engines of a placement must agree on it."""
    if token in sampling.stop_token_ids:
        return FinishReason.STOP
    if num_generated >= sampling.max_tokens or num_prompt + num_generated >= max_context_tokens:
        return FinishReason.LENGTH
    return None


def next_row(
    sampling: SamplingParams, tokens: Sequence[int], start: int, num_tokens: int, *, slot: int, blocks: Sequence[int]
) -> StepRow:
    """Positions start .. start + num_tokens - 1 of a sequence whose known ids are `tokens`.

    It samples exactly when it reaches the last known id; the sampled token's place in the sequence is then
    len(tokens), whether the ids before it came from a prompt, a transfer or an earlier try.
    """
    stop = start + num_tokens
    assert 0 <= start < stop <= len(tokens)
    sample = None
    if stop == len(tokens):
        sample = SampleSpec(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, stop)
    row_tokens = tuple(tokens[start:stop])
    return StepRow(slot=slot, num_tokens=num_tokens, tokens=row_tokens, start=start, blocks=blocks, sample=sample)


def execute(runner: Runner, plan: StepPlan) -> StepResult:
    """Run one step to its end. Whatever goes wrong in the runner is raised as EngineFault; the cause is in the log."""
    try:
        runner.launch(plan)
        result = runner.collect()
    except Exception as exc:
        log.exception("step %d with %d rows raised", plan.step_id, len(plan.rows))
        raise EngineFault("the engine failed while computing this request", f"{type(exc).__name__}: {exc}") from exc
    sampled = [row.sample is not None for row in plan.rows]
    if result.step_id != plan.step_id or [token is not None for token in result.tokens] != sampled:
        log.error("step %d came back as %r", plan.step_id, result)
        raise EngineFault("the engine failed while computing this request", "the step's result does not fit its plan")
    return result


class StageTimer:
    """Seconds that one request spends in each stage; begins in the queue. Stages may be entered again."""

    __slots__ = ("_seconds", "_since", "_stage")

    def __init__(self, now: float) -> None:
        self._stage: Stage = "queue"
        self._since = now
        self._seconds: dict[Stage, float] = {"queue": 0.0, "prefill": 0.0, "transfer": 0.0, "decode": 0.0}

    def enter(self, stage: Stage, now: float) -> None:
        """The present stage ends and `stage` begins."""
        self._seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now

    def read(self, now: float) -> StageTimes:
        """The sums, the present stage included."""
        self.enter(self._stage, now)
        return StageTimes(**self._seconds)


class Deadlines:
    """The deadlines of the requests that live, earliest first. Memory stays in proportion to those."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, TransferKey]] = []
        self._live: dict[TransferKey, float] = {}

    def add(self, key: TransferKey, deadline: float | None) -> None:
        """Watch a request; None means that it has no deadline."""
        if deadline is not None:
            self._live[key] = deadline
            heapq.heappush(self._heap, (deadline, key))

    def discard(self, key: TransferKey) -> None:
        """Forget a request; unknown keys are ignored."""
        self._live.pop(key, None)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [(deadline, key) for key, deadline in self._live.items()]
            heapq.heapify(self._heap)

    def earliest(self) -> float | None:
        """The next deadline, or None."""
        while self._heap and self._live.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> list[TransferKey]:
        """The requests whose deadline is not after `now`, earliest first. They are forgotten."""
        due: list[TransferKey] = []
        while (deadline := self.earliest()) is not None and deadline <= now:
            _, key = heapq.heappop(self._heap)
            del self._live[key]
            due.append(key)
        return due
