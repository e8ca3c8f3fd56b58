"""The parts of a request's life that are the same in both workers: refusal, row, end, times, deadlines.

Pure. Called by the workers from the step thread; knows no states, no queues, no runner.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from .barrier import fault_of
from .constraint import Guide
from .errors import ContextTooLong, DiptychError, EngineFault, InvalidRequest, param_of
from .fair_line import Place
from .ports import Clock, Emit
from .step import LogitRules, SampleSpec, StepPlan, StepResult, StepRow
from .types import (
    DecodeOrder,
    Finish,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    PromptLogprobs,
    Role,
    SamplingParams,
    StageTimes,
    StepOutput,
    TokenLogprobs,
    TransferKey,
)

Stage = Literal["queue", "prefill", "transfer", "decode"]


def refusal(request: GenerateRequest, max_context_tokens: int, vocab_size: int) -> DiptychError | None:
    """Why no engine of this model can take the request, or None."""
    if not request.prompt:
        return InvalidRequest("the prompt has no tokens", "prompt")
    if len(request.known) >= max_context_tokens:
        what = "prompt and resume have" if request.resume else "the prompt has"
        return ContextTooLong(
            f"{what} {len(request.known)} tokens: "
            f"the context of {max_context_tokens} tokens leaves no room for an answer"
        )
    for name, ids in (("prompt", request.prompt), ("resume", request.resume)):
        if (highest := max(ids, default=0)) >= vocab_size:
            # A tokenizer can know more ids than the weights have rows. In a step it would take all others down with it.
            return InvalidRequest(
                f"the {name} holds the token id {highest}; this model's ids go from 0 to {vocab_size - 1}", name
            )
    return _complete(request, max_context_tokens) if request.resume else None


def _complete(request: GenerateRequest, max_context_tokens: int) -> DiptychError | None:
    reason = finish_reason(
        request.sampling,
        request.resume[-1],
        num_generated=len(request.resume),
        num_prompt=len(request.prompt),
        max_context_tokens=max_context_tokens,
    )
    if reason is None:
        return None
    return InvalidRequest(f"the answer is complete with the {len(request.resume)} tokens of resume: {reason}", "resume")


def finish_reason(
    sampling: SamplingParams, token: int, *, num_generated: int, num_prompt: int, max_context_tokens: int
) -> FinishReason | None:
    """Whether `token`, the last of `num_generated`, ends the request. Both engines of a placement must agree on it."""
    if token in sampling.stop_token_ids and num_generated > sampling.min_tokens:
        return FinishReason.STOP
    if num_generated >= sampling.max_tokens or num_prompt + num_generated >= max_context_tokens:
        return FinishReason.LENGTH
    return None


def logit_rules(sampling: SamplingParams, num_prompt: int) -> LogitRules | None:
    """What changes the logits of a request before temperature and filters, or None when nothing does."""
    min_tokens = sampling.min_tokens if sampling.stop_token_ids else 0
    rules = LogitRules(
        num_prompt=num_prompt,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        bad_words=sampling.bad_words,
        allowed_token_ids=sampling.allowed_token_ids,
        min_tokens=min_tokens,
        stop_token_ids=tuple(sorted(sampling.stop_token_ids)) if min_tokens else (),
    )
    return None if rules == LogitRules(num_prompt=num_prompt) else rules


class RowMaker:
    """Makes the rows of one request, whatever way it goes through an engine.

    Knows what must happen once: one LogitRules for all rows, the history with the first sample in a slot, each prompt
    position's logprobs.
    """

    __slots__ = ("_asked", "_history_due", "_key", "_num_prompt", "_sampling", "_told", "guide", "rules")

    def __init__(self, request: GenerateRequest, guide: Guide | None = None) -> None:
        self.guide = guide
        self._key = request.key
        self._num_prompt = len(request.prompt)
        self._sampling = request.sampling
        self._history_due = True
        # The last prompt position whose logprobs are out. Whoever saw tokens of the answer has been told them all.
        self._told = len(request.prompt) - 1 if request.resume else 0
        self._asked = self._told  # the last one that a row has asked for; ahead of `_told` while that row is under way
        self.rules = logit_rules(request.sampling, len(request.prompt))

    def new_slot(self) -> None:
        """The rows to come are in another slot, or in one that was given back in between."""
        self._history_due = True

    def prompt_is_told(self) -> None:
        """Another engine has computed the prompt and told its logprobs."""
        self._told = self._asked = self._num_prompt - 1

    @property
    def asks_of_prompt(self) -> bool:
        """Whether the next row is asked about its positions: no longer than MOST_TOLD with all others of its step."""
        return self._sampling.prompt_logprobs is not None and self._asked < self._num_prompt - 1

    def max_cached_tokens(self, num_tokens: int) -> int:
        """How much of `num_tokens` known ones may come from the prefix cache: the last one is sampled from, and who
        asked for prompt logprobs needs all that were not told.
        """
        owed = self._sampling.prompt_logprobs is not None and self._told < self._num_prompt - 1
        return min(self._told, num_tokens - 1) if owed else num_tokens - 1

    def next_row(
        self,
        tokens: Sequence[int],
        start: int,
        num_tokens: int,
        *,
        slot: int,
        blocks: Sequence[int],
        pending: int = 0,
    ) -> StepRow:
        """Positions start .. start + num_tokens - 1 of the sequence whose known ids are `tokens`. `pending` more were
        sampled in the slot, or will be, and are not read yet; a row of one token may begin with the last of them.

        It samples exactly when it reaches the last id; the sampled token's place in the sequence is then
        len(tokens) + pending, whether the ids before it came from a prompt, a transfer, an earlier try or another
        engine's.
        """
        stop, length = start + num_tokens, len(tokens) + pending
        assert 0 <= start < stop <= length
        assert stop <= len(tokens) or (num_tokens == 1 and stop == length), "an id that nobody can tell"
        prompt_logprobs, next_token = self._sampling.prompt_logprobs, None
        if prompt_logprobs is not None and self._asked < (last := min(stop, self._num_prompt - 1)):
            assert start <= self._asked, "a part of the prompt that was asked about is not computed"
            next_token = tokens[stop] if stop < self._num_prompt else None
            self._asked = last
        else:
            prompt_logprobs = None
        return StepRow(
            slot=slot,
            num_tokens=num_tokens,
            tokens=tuple(tokens[start:stop]) if stop <= len(tokens) else None,
            start=start,
            blocks=blocks,
            sample=self._sample(tokens, length) if stop == length else None,
            prompt_logprobs=prompt_logprobs,
            next_token=next_token,
        )

    def tell_prompt(self, row: StepRow, logprobs: Sequence[TokenLogprobs]) -> PromptLogprobs | None:
        """What of a computed row's prompt logprobs is news, or None."""
        first = self._told + 1
        news = tuple(logprobs[first - (row.start + 1) : self._num_prompt - (row.start + 1)])
        self._told += len(news)
        return PromptLogprobs(self._key, first, news) if news else None

    def _sample(self, tokens: Sequence[int], position: int) -> SampleSpec:
        sampling, rules = self._sampling, self.rules
        history = None
        if self._history_due and rules is not None and rules.needs_history:
            assert position == len(tokens), "the first sample of a slot looks back at ids that are not known"
            history = tuple(tokens)
        self._history_due = False
        return SampleSpec(
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.seed,
            position,
            min_p=sampling.min_p,
            logprobs=sampling.logprobs,
            rules=rules,
            history=history,
            guide=self.guide,
        )


def row_fault(plan: StepPlan, result: StepResult, at: int) -> DiptychError:
    """How the request of row `at` ends, one of the step's faults: InvalidRequest where its rules are to blame."""
    sample = plan.rows[at].sample
    if at in result.ruled_out and sample is not None:
        if sample.guide is not None and sample.guide.error is not None:
            return sample.guide.error
        if sample.rules is not None:
            number = sample.position - sample.rules.num_prompt
            return _no_token_left(sample.rules, number, has_guide=sample.guide is not None)
    return EngineFault("the model's numbers for this request are not finite", "the row came back among the faults")


def _no_token_left(rules: LogitRules, num_generated: int, *, has_guide: bool) -> InvalidRequest:
    given = {
        "allowed_token_ids": rules.allowed_token_ids is not None,
        "bad_words": bool(rules.bad_words),
        "min_tokens": num_generated < rules.min_tokens,
    }
    # Only where nothing bars a token outright can a bias or a penalty have made every logit infinite.
    names = [name for name, is_given in given.items() if is_given] or ["logit_bias"]
    what = "every one that the form of the answer allows" if has_guide else "every one"
    return InvalidRequest(
        f"no token is left by the rules of this request after {num_generated} generated tokens: "
        f"{' and '.join(names)} exclude{'s' if len(names) == 1 else ''} {what}",
        names[0],
    )


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


class Books:
    """Of one worker: how many of its requests have no end yet, their deadlines, its totals, and what it has to emit."""

    def __init__(self, role: Role, emit: Emit, clock: Clock, totals: Iterable[str]) -> None:
        """`totals`: names of what is counted beside requests and their cached tokens."""
        self.num_live = 0
        self.deadlines = Deadlines()
        self.out = StepOutput()
        self.totals = dict.fromkeys(("requests", "cached_tokens", "request_faults", *totals), 0)
        self.step_seconds = 0.0
        self._role = role
        self._emit = emit
        self._clock = clock

    def begin(self, order: PrefillOrder | DecodeOrder) -> tuple[Place, StageTimer, RowMaker]:
        """A request that `end` will end. Counts nothing where it raises."""
        place = Place.of(order.request, self.totals["requests"] + 1)
        rows = RowMaker(order.request, order.guide)
        self.totals["requests"] += 1
        self.num_live += 1
        return place, StageTimer(self._clock()), rows

    def fault(self, exc: BaseException, key: TransferKey, stage: str) -> DiptychError:
        """See barrier.fault_of; counted."""
        error = fault_of(exc, key, stage)
        self.totals["request_faults"] += 1
        return error

    def refuse(self, key: TransferKey, error: DiptychError) -> None:
        """The end of a request that never began."""
        self.out.finishes.append(
            Finish(
                key=key,
                role=self._role,
                reason=FinishReason.ERROR,
                error_code=error.code,
                error_message=str(error),
                error_param=param_of(error),
            )
        )

    def end(self, finish: Finish, timer: StageTimer, error: DiptychError | None) -> None:
        """The terminal event; its times are the timer's, and its words those of an error that it ends with."""
        self.deadlines.discard(finish.key)
        self.num_live -= 1
        self.totals["cached_tokens"] += finish.cached_tokens
        if error is not None and finish.reason is FinishReason.ERROR:
            finish = replace(finish, error_code=error.code, error_message=str(error), error_param=param_of(error))
        self.out.finishes.append(replace(finish, times=timer.read(self._clock())))

    def flush(self) -> None:
        """Emit what has gathered."""
        if self.out:
            out, self.out = self.out, StepOutput()
            self._emit(out)

    def counters(self) -> dict[str, float]:
        """The totals and the seconds of all steps, under the role's names."""
        counters = {f"{self._role}_{name}_total": float(value) for name, value in self.totals.items()}
        counters[f"{self._role}_step_seconds_total"] = self.step_seconds
        return counters


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
