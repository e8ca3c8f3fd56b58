"""A scheduler's order to a runner, in plain integers, and what comes back. No torch: the schedulers import it.

blocks of a row, block_tokens = 4         start = 6, num_tokens = 3: positions 6, 7, 8 are computed
| b7: 0 1 2 3 | b2: 4 5 6 7 | b9: 8 . . . |      (KV of 0..5 lies in the blocks already)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .constraint import Guide
from .types import TokenLogprobs

# Positions of prompts whose logprobs a step is asked for at most: each takes a row of logits, 250 KiB of 128,000 ids.
MOST_TOLD = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRules:
    """What changes one request's logits before temperature and filters; one object for all its rows."""

    num_prompt: int
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # not sampled while fewer than min_tokens are generated

    @property
    def needs_history(self) -> bool:
        """Whether the sequence's earlier tokens matter."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or any(len(word) > 1 for word in self.bad_words)


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Sample one token after the row's last position. The random number depends on (seed, position) only."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int  # of the sampled token in the sequence: start + num_tokens of its row
    min_p: float = 0.0
    logprobs: int | None = None  # see SamplingParams
    rules: LogitRules | None = None
    # All ids known so far, prompt first, with the slot's first sample; None later: the runner adds what it samples.
    # Given only where rules.needs_history.
    history: tuple[int, ...] | None = None
    # Asked for the mask of `position` once the tokens before it are known, and told what was sampled.
    guide: Guide | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One sequence's share of a step.

    `tokens` holds the ids of positions start .. start + num_tokens - 1. It is None when num_tokens is 1 and the id is
    the token that the runner sampled last for `slot`: a step may be launched before the host has read the last one.
    """

    slot: int  # the sequence's place in the runner's state, 0 .. max_slots - 1, stable while the sequence runs
    num_tokens: int
    tokens: tuple[int, ...] | None
    start: int
    # Block ids for positions 0 .. start + num_tokens - 1 at least. May grow at the end until the step is collected,
    # and belongs to the row so long; a runner reads it in `launch` alone.
    blocks: Sequence[int]
    sample: SampleSpec | None  # None: the prompt goes on in a later step
    # Alternatives told with the tokens after each of the row's positions, which are MOST_TOLD in a step at most.
    prompt_logprobs: int | None = None
    next_token: int | None = None  # with prompt_logprobs, where the prompt goes on: its token after the row's last


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a ragged batch."""

    step_id: int
    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        """Over all rows."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """tokens[i] is the token sampled for rows[i] of the plan, None where the row did not sample or is in `faults`.

    The mappings are by index of the row. prompt_logprobs[i] are those of positions start + 1 .. start + num_tokens, the
    last one only where the row has a `next_token`.
    """

    step_id: int
    tokens: tuple[int | None, ...]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    faults: frozenset[int] = frozenset()  # rows with numbers not finite or no token left by their rules
    # Those of `faults` with sound numbers, whose rules, or guide, left no token.
    ruled_out: frozenset[int] = frozenset()
    forced: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # what its guide says follows a row's token


class SlotPool:
    """The runner's state slots of one engine, shared by its workers. Step thread only."""

    def __init__(self, max_slots: int) -> None:
        self._free = list(range(max_slots - 1, -1, -1))
        self.max_slots = max_slots

    def try_take(self) -> int | None:
        """A free slot, or None."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Return a slot that try_take gave."""
        assert slot not in self._free
        assert 0 <= slot < self.max_slots
        self._free.append(slot)

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)
