"""A step's plan as one int32 array that is copied to the device at once, and what the host remembers of each slot, so
that only what is new travels.

header[16]  | rows x 8: slot start num first place 0 0 0 | words to update | their values | tail
place: the row of logits that the row samples from, -1 where it does not sample. Padding rows are the dummy slot's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.protos.step import LogitRules, SampleSpec, StepPlan, StepRow

from .rules import RuleStore, record
from .state import DRAW, FILTERED, GREEDY, WITH_LOGPROBS, WITH_RULES, DeviceState

HEADER = 16  # words before the rows
ROW = 8  # words of a row
NUM_UPDATES, UPDATES_AT = 0, 1  # words of the header: how many, and where they begin
Words = NDArray[np.int32]
_FREE = LogitRules(num_prompt=0)  # of a row with a guide and no rules: its logits are copied to be masked


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of the plan whose prompt tokens are to be told."""

    row: int  # of the plan
    places: range  # in the logits, of the positions before these tokens
    tokens: Sequence[int]
    top: int


class Sampling(NamedTuple):
    """A row that samples."""

    row: int  # of the plan
    at: int  # in the layout's order
    place: int  # in the logits
    slot: int
    spec: SampleSpec
    is_told: bool = True  # the device has its rules; there was no room for those of others


class Tail(NamedTuple):
    """The lists at the end of a wire."""

    asked: list[int]  # rows, by number, that want more than their largest logit
    masked: list[int]  # of each of these, the number of its guide's mask, or -1
    told: list[int]  # places of rows that sample and tell their logprobs
    prompts: list[int]  # places before tokens of prompts that are told
    tokens: list[int]  # those
    kept: list[int]  # of the layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A plan in the order of the device: rows of one token first. Counts are without padding."""

    order: Sequence[int]  # the plan's row of each row
    singles: int  # rows of one token
    num_tokens: int
    most_prompt: int  # tokens of the longest of the other rows
    sampling: list[Sampling]  # in order of place
    special: list[int]  # those of them, by number, that want more than a token that is the largest logit
    prompts: list[PromptRow]
    kept: list[int]  # tokens whose logits are wanted, by place; of a pure decode step every token, and the list empty
    rows: list[int]  # ROW words of each row, padding included
    updates: Updates
    gap: int = 0  # rows of padding between those of one token and prompts

    @property
    def num_rows(self) -> int:
        """Of the plan."""
        return len(self.order)

    @property
    def asking(self) -> list[Sampling]:
        """Rows that draw, or have rules or a guide."""
        special = [self.sampling[at] for at in self.special]
        return [one for one in special if one.spec.temperature != 0 or one.spec.rules or one.spec.guide]

    @property
    def guided(self) -> list[Sampling]:
        """Rows that a guide has a mask for, in the order of the masks."""
        return [one for one in self.asking if one.spec.guide is not None]

    @property
    def telling(self) -> list[Sampling]:
        """Rows that tell their logprobs."""
        special = [self.sampling[at] for at in self.special]
        return [one for one in special if one.spec.logprobs is not None]

    @property
    def tail(self) -> Tail:
        """In the order of `sampling` and `prompts`."""
        numbers = iter(range(len(self.special)))
        numbered = [(one, next(numbers) if one.spec.guide is not None else -1) for one in self.asking]
        asked = [one.at for one, _ in numbered if one.is_told]
        masked = [number for one, number in numbered if one.is_told]
        if self.gap:
            asked = [at if at < self.singles else at + self.gap for at in asked]
        told = [one.place for one in self.telling]
        prompts = [place for prompt in self.prompts for place in prompt.places]
        return Tail(
            asked, masked, told, prompts, [token for prompt in self.prompts for token in prompt.tokens], self.kept
        )

    @property
    def is_decode(self) -> bool:
        """Nothing but rows of one token, of which nothing is told but what they sample."""
        return self.most_prompt == 0 and not self.prompts

    def padded(self, singles: int, prompts: int, tokens: int, dummy: int) -> Layout:
        """The same step as `singles` rows of one token and `prompts` rows behind them, the last of which has what lacks
        in `tokens`. What is added is the dummy's; a row's place in the logits is its own number.
        """
        own, gap = len(self.order), singles - self.singles
        words = self.rows[: ROW * self.singles]
        for at in range(self.singles, singles):
            words += (dummy, 0, 1, at, -1, 0, 0, 0)
        if not prompts:  # of a decode step places are the rows' numbers already
            return replace(self, rows=words)
        for at in range(self.singles):
            words[ROW * at + 4] = at if words[ROW * at + 4] >= 0 else -1
        for at in range(self.singles, own):
            slot, start, num, first, place = self.rows[ROW * at : ROW * at + 5]
            words += (slot, start, num, first + gap, at + gap if place >= 0 else -1, 0, 0, 0)
        end = self.num_tokens + gap
        for at in range(own + gap, singles + prompts):
            words += (dummy, 0, tokens - end if at == singles + prompts - 1 else 0, end, -1, 0, 0, 0)
        sampling = [one._replace(place=one.at if one.at < self.singles else one.at + gap) for one in self.sampling]
        return replace(self, rows=words, sampling=sampling, kept=[], gap=gap)


@dataclass(slots=True)
class Updates:
    """Words of the state to set, as single ones and as runs of neighbours."""

    words: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    runs: list[tuple[int, Sequence[int]]] = field(default_factory=list)

    def set(self, word: int, value: int) -> None:
        """One word."""
        self.words.append(word)
        self.values.append(value)

    def set_run(self, word: int, values: Sequence[int]) -> None:
        """Neighbours from `word` on."""
        if len(values) == 1:
            self.set(word, values[0])
        elif values:
            self.runs.append((word, values))

    @property
    def count(self) -> int:
        """Words to set."""
        return len(self.words) + sum(len(values) for _, values in self.runs)

    def write(self, words: Words, values: Words) -> None:
        """Fill two arrays of `count` each."""
        at = len(self.words)
        words[:at] = self.words
        # By way of int64: an id or a float's bits may have the sign bit.
        values[:at] = np.array(self.values, dtype=np.int64)
        for first, run in self.runs:
            here = slice(at, at + len(run))
            words[here] = np.arange(first, first + len(run))
            values[here] = run
            at = here.stop


@dataclass(slots=True)
class _Mirror:
    """What the device has been told of a slot."""

    blocks: Sequence[int] = ()  # the very object of its last row
    sent: int = 0  # entries of it that the device has
    end: int = 0  # positions after its last row
    sampled: bool = False  # its last row
    params: tuple[float, ...] = ()
    known: int = 0  # positions from 0 on whose ids the device has, where rules look at them


class Packer:
    """Lays plans out, in the order in which they are launched: each one changes what the device knows."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state
        self._mirrors = [_Mirror() for _ in range(state.max_slots)]
        self._rules = RuleStore(len(state.rules_W))

    def lay_out(self, plan: StepPlan) -> Layout:
        """The plan's rows and what the device must be told first. AssertionError: it breaks the Protocol's rules."""
        rows = plan.rows
        singles = [at for at, row in enumerate(rows) if row.num_tokens == 1]
        order = singles if len(singles) == len(rows) else singles + [a for a, r in enumerate(rows) if r.num_tokens > 1]
        assert len(order) == len(rows), "a row has no tokens"
        is_decode = len(singles) == len(rows) and all(row.prompt_logprobs is None for row in rows)
        words: list[int] = []
        updates = Updates()
        sampling: list[Sampling] = []
        special: list[int] = []
        kept: list[int] = []
        prompts: list[PromptRow] = []
        first = most = 0
        for at, index in enumerate(order):
            row = rows[index]
            self._check(row)
            place = -1
            if row.sample is not None:
                place = at if is_decode else len(kept)
                if not is_decode:
                    kept.append(first + row.num_tokens - 1)
            is_told = self._tell(row, updates)
            spec = row.sample
            if spec is not None:
                if spec.temperature != 0 or spec.rules or spec.logprobs is not None or spec.guide is not None:
                    special.append(len(sampling))
                sampling.append(Sampling(index, at, place, row.slot, spec, is_told))
            words += (row.slot, row.start, row.num_tokens, first, place, 0, 0, 0)
            first += row.num_tokens
            if row.num_tokens > 1:
                most = max(most, row.num_tokens)
        if not is_decode:
            prompts = _keep_prompts(rows, order, words, kept)
        return Layout(
            order=order,
            singles=len(singles),
            num_tokens=first,
            most_prompt=most,
            sampling=sampling,
            special=special,
            prompts=prompts,
            kept=kept,
            rows=words,
            updates=updates,
        )

    def forget(self, plan: StepPlan) -> None:
        """The plan's step failed: nobody knows what the device has of its slots."""
        for slot in {row.slot for row in plan.rows} & set(range(len(self._mirrors))):
            self._mirrors[slot] = _Mirror()
            self._rules.forget(slot)

    def _check(self, row: StepRow) -> None:
        assert 0 <= row.slot < self._state.max_slots, f"slot {row.slot}"
        assert row.start >= 0, f"start {row.start}"
        end = row.start + row.num_tokens
        assert end <= self._state.max_context_tokens, "beyond the model's context"
        assert len(row.blocks) * self._state.block_tokens >= end, "a row has fewer blocks than tokens"
        if row.tokens is None:
            assert row.num_tokens == 1, "only one token can come from the slot"
            assert row.prompt_logprobs is None, "a prompt's token cannot come from the slot"
        else:
            assert len(row.tokens) == row.num_tokens, "num_tokens does not match tokens"

    def _tell(self, row: StepRow, updates: Updates) -> bool:
        """Whether the device has all that the row samples by."""
        state, mirror, end = self._state, self._mirrors[row.slot], row.start + row.num_tokens
        self._tell_blocks(row, mirror, updates)
        spec = row.sample
        history, is_told = None, True
        if spec is not None:
            rules = _FREE if spec.rules is None and spec.guide is not None else spec.rules
            is_told = self._tell_rules(row.slot, rules, updates)
            self._tell_params(row.slot, spec, mirror, updates)
            history = _recall(row.slot, spec, mirror)
        tokens = state.offsets["tokens"] + row.slot * state.tokens_stride
        if history is not None:  # the row's own ids are its last ones
            updates.set_run(tokens, history)
        elif row.tokens is not None:
            updates.set_run(tokens + row.start, row.tokens)
        mirror.end, mirror.sampled = end, spec is not None
        return is_told

    def _tell_blocks(self, row: StepRow, mirror: _Mirror, updates: Updates) -> None:
        """Entries that are new. A table keeps one list for its life, and until its sequence samples, own blocks from
        the first position that was not computed on may give way to others with the same content.
        """
        size = self._state.block_tokens
        wanted = -(-(row.start + row.num_tokens) // size)
        if row.blocks is not mirror.blocks:
            mirror.blocks, mirror.sent = row.blocks, 0
        elif not mirror.sampled:
            mirror.sent = min(mirror.sent, mirror.end // size)
        if wanted > mirror.sent:
            first = self._state.offsets["blocks"] + row.slot * self._state.blocks_stride
            updates.set_run(first + mirror.sent, row.blocks[mirror.sent : wanted])
            mirror.sent = wanted

    def _tell_params(self, slot: int, spec: SampleSpec, mirror: _Mirror, updates: Updates) -> None:
        kind = _kind(spec)
        params: tuple[float, ...] = (spec.temperature, spec.top_p, spec.min_p, spec.top_k, spec.seed, kind)
        if params == mirror.params:
            return
        mirror.params = params
        offsets = self._state.offsets
        temperature = int(np.array(spec.temperature, dtype=np.float32).view(np.int32))
        for name, value in (("temperature", temperature), ("top_k", spec.top_k), ("kind", kind)):
            updates.set(offsets[name] + slot, value)
        halves = np.array((spec.top_p, spec.min_p), dtype=np.float64).view(np.int32).tolist()
        updates.set_run(offsets["top_p"] + 2 * slot, halves[:2])
        updates.set_run(offsets["min_p"] + 2 * slot, halves[2:])
        seed = offsets["seed"] + 2 * slot
        updates.set(seed, spec.seed & 0xFFFFFFFF)
        updates.set(seed + 1, spec.seed >> 32 & 0xFFFFFFFF)

    def _tell_rules(self, slot: int, rules: LogitRules | None, updates: Updates) -> bool:
        """False: there is no room for them."""
        if rules is None:
            self._rules.forget(slot)
            return True
        if self._rules.knows(slot, rules):
            return True
        words = record(rules, self._state.vocab_size)
        place = self._rules.try_place(slot, rules, len(words))
        if place is None:
            return False
        updates.set(self._state.offsets["record"] + slot, place)
        updates.set_run(self._state.offsets["rules"] + place, words.tolist())
        return True


def _keep_prompts(rows: Sequence[StepRow], order: Sequence[int], words: list[int], kept: list[int]) -> list[PromptRow]:
    """Add the tokens before those that are to be told to `kept`."""
    prompts = []
    for at, index in enumerate(order):
        row = rows[index]
        if row.prompt_logprobs is not None and row.tokens is not None:
            tokens = [*row.tokens[1:], *(() if row.next_token is None else (row.next_token,))]
            first, place = words[ROW * at + 3], len(kept)
            kept.extend(range(first, first + len(tokens)))
            prompts.append(PromptRow(index, range(place, len(kept)), tokens, row.prompt_logprobs))
    return prompts


def _kind(spec: SampleSpec) -> int:
    kind = GREEDY
    if spec.temperature != 0:
        kind = FILTERED if spec.top_k > 0 or spec.top_p < 1 or spec.min_p > 0 else DRAW
    if spec.rules is not None or spec.guide is not None:
        kind |= WITH_RULES
    return kind if spec.logprobs is None else kind | WITH_LOGPROBS


def _recall(slot: int, spec: SampleSpec, mirror: _Mirror) -> tuple[int, ...] | None:
    """The history to send, of a sequence whose rules look at its tokens and whose first sample in this slot this is."""
    if spec.rules is None or not spec.rules.needs_history:
        mirror.known = 0
        return None
    if spec.history is not None:
        mirror.known = len(spec.history)
    assert mirror.known == spec.position, (
        f"slot {slot} samples position {spec.position}, its history has {mirror.known}"
    )
    mirror.known += 1
    return spec.history


class Wire:
    """Host memory of one step on its way. Pinned where the device copies from it."""

    def __init__(self, memory: Words) -> None:
        self._memory = memory

    def fill(self, layout: Layout) -> tuple[int, Tail, Updates | None]:
        """Write a step, and its updates if they fit.

        Gives the words to copy, the tail that they end in, and updates that found no room (long histories and block
        tables): they have to reach the device by another way, before the step.
        """
        memory = self._memory
        at = HEADER + len(layout.rows)
        memory[HEADER:at] = layout.rows
        count, spilled = layout.updates.count, None
        tail = layout.tail
        last = [*tail.asked, *tail.masked, *tail.told, *tail.prompts, *tail.tokens, *tail.kept]
        if _aligned(at + 2 * count) + len(last) > len(memory):
            count, spilled = 0, layout.updates
        memory[NUM_UPDATES], memory[UPDATES_AT] = count, at
        if count:
            layout.updates.write(memory[at : at + count], memory[at + count : at + 2 * count])
        begin = _aligned(at + 2 * count)
        end = begin + len(last)
        memory[begin:end] = last
        return end, tail, spilled


def _aligned(words: int) -> int:
    """Where a kernel may be told that a pointer points: others would be compiled as they come."""
    return -(-words // 4) * 4


def wire_words(*, max_rows: int, max_step_tokens: int) -> int:
    """Size of a Wire's memory: every row, every token given, told and kept, and a good deal of block tables beside."""
    return (
        HEADER
        + ROW * max_rows
        + 2 * (2 * max_step_tokens + 64 * max_rows)
        + 3 * (max_step_tokens + max_rows)
        + max_rows
    )
