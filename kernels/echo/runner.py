"""The echo model's runner: a step's plan in, tokens that hash all the KV that their rows read out. No torch.

A step writes the KV of its tokens, then reads every row's KV from position 0 on, as attention does. A row whose KV is
not what the tokens at these positions make, in any bit, samples BAD, and what it wrote stays unusable for good.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diptych.protos.constraint import fill_masks, mask_words
from diptych.protos.echo import BAD, STOP, VOCAB_SIZE
from diptych.protos.ports import StepCost
from diptych.protos.step import StepPlan, StepResult, StepRow
from diptych.protos.types import TokenLogprobs

from .choice import Guess, choose, first_of
from .form import Allowed
from .hashing import POISON, ROOT, U64, favourite_array, share_array
from .memory import EchoMemory, Int, chain

MAX_OUTSTANDING = 2
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A plan as columns: R rows, T new tokens, B blocks that the rows read."""

    blocks_B: Int
    first_R: Int  # index in blocks_B of each row's first block
    ends_R: Int  # positions that each row reads
    rows_B: Int  # which row a block belongs to
    tokens_T: U64
    rows_T: Int
    positions_T: Int
    places_T: tuple[Int, Int]  # block and offset
    lost: frozenset[int]  # rows whose token should come from a slot that has none


@dataclass(frozen=True, slots=True)
class _Read:
    """What the rows' blocks hold, flat: position p of row r is at first_R[r] * block_tokens + p."""

    states: U64
    tokens: U64
    bad_R: NDArray[np.bool_]
    stops_R: NDArray[np.bool_]  # whether a STOP is among the tokens


class EchoRunner:
    """Implements ports.Runner over the memory of an arena, see EchoMemory. One thread uses it.

    A step takes `step_s` seconds and `token_s` for each of its tokens, one step after another: `collect` waits for it.
    """

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        memory: NDArray[np.uint8],
        *,
        max_slots: int,
        max_step_tokens: int,
        depth: int = 1,
        step_s: float = 0.0,
        token_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.max_slots = max_slots
        self.max_step_tokens = max_step_tokens
        self.depth = depth
        self.cost: StepCost | None = None
        self._memory = EchoMemory(memory)
        self._size = self._memory.block_tokens
        self._offsets = np.arange(self._size)
        self._cost = step_s, token_s
        self._clock, self._sleep = clock, sleep
        self._busy_until = clock()
        self._last_tokens = [_NO_TOKEN] * max_slots
        self._outstanding: deque[tuple[float, StepResult]] = deque()

    def launch(self, plan: StepPlan) -> None:
        """See ports.Runner. A plan that breaks the Protocol's rules is an AssertionError here, not a failed step."""
        assert len(self._outstanding) < MAX_OUTSTANDING, "two steps are outstanding already"
        assert 0 < plan.num_tokens <= self.max_step_tokens, f"a step of {plan.num_tokens} tokens"
        inputs = self._lay_out(plan)
        read = self._read(inputs, self._write(inputs))
        if read.bad_R.any():
            self._poison(inputs, read)
        step_s, token_s = self._cost
        # Before the choice: masks are filled while a device would compute.
        ready = self._busy_until = max(self._clock(), self._busy_until) + step_s + token_s * plan.num_tokens
        self._outstanding.append((ready, self._answer(plan, inputs, read)))

    def collect(self) -> StepResult:
        """See ports.Runner. Rows in `faults`: their rules left no token, or the slot to go on from had none."""
        assert self._outstanding, "no step is outstanding"
        ready, result = self._outstanding.popleft()
        if any(self._cost) and (left := ready - self._clock()) > 0:
            self._sleep(left)
        return result

    def max_runs(self, rows: int) -> int:
        """See ports.Runner: all of them."""
        return rows

    def idle(self) -> bool:
        """See ports.Runner: nothing."""
        return False

    def _lay_out(self, plan: StepPlan) -> _Inputs:
        size = self._size
        blocks: list[int] = []
        tokens: list[int] = []
        starts, counts, numbers = [], [], []
        lost = set()
        for index, row in enumerate(plan.rows):
            used = -(-(row.start + row.num_tokens) // size)
            blocks.extend(row.blocks[:used])
            assert 0 <= row.slot < self.max_slots, f"slot {row.slot}"
            assert len(row.blocks) >= used, f"{len(row.blocks)} blocks for {row.start + row.num_tokens} positions"
            if row.tokens is None:
                assert row.num_tokens == 1, "only one token can come from the slot"
                token = self._last_tokens[row.slot]
                if token == _NO_TOKEN:
                    lost.add(index)
                    token = BAD
                tokens.append(token)
            else:
                assert len(row.tokens) == row.num_tokens, "num_tokens does not match tokens"
                tokens.extend(row.tokens)
            starts.append(row.start)
            counts.append(row.num_tokens)
            numbers.append(used)
        starts_R, counts_R, numbers_R = np.array(starts), np.array(counts), np.array(numbers)
        rows = np.arange(len(plan.rows))
        first_R = np.cumsum(numbers_R) - numbers_R
        blocks_B = np.array(blocks, dtype=np.int64)
        rows_T = np.repeat(rows, counts_R)
        begins_R = np.cumsum(counts_R) - counts_R
        positions_T = np.arange(len(tokens)) + (starts_R - begins_R)[rows_T]
        places_T = blocks_B[first_R[rows_T] + positions_T // size], positions_T % size
        return _Inputs(
            blocks_B,
            first_R,
            starts_R + counts_R,
            np.repeat(rows, numbers_R),
            np.array(tokens, dtype=np.uint64),
            rows_T,
            positions_T,
            places_T,
            frozenset(lost),
        )

    def _write(self, inputs: _Inputs) -> U64:
        """The states of the new tokens: they go on from what lies at the position before each row's start."""
        blocks_T, offsets_T = inputs.places_T
        begins_R = np.searchsorted(inputs.rows_T, np.arange(len(inputs.first_R)))
        starts_R = inputs.positions_T[begins_R]
        before_R = np.maximum(starts_R - 1, 0)
        found_R = self._memory.state(inputs.blocks_B[inputs.first_R + before_R // self._size], before_R % self._size)
        base_R = np.where(starts_R > 0, found_R, np.uint64(ROOT))
        sums_T: U64 = np.cumsum(share_array(inputs.tokens_T, inputs.positions_T.astype(np.uint64)), dtype=np.uint64)
        earlier_R = np.where(begins_R > 0, sums_T[begins_R - 1], np.uint64(0))
        states_T: U64 = sums_T + (base_R - earlier_R)[inputs.rows_T]
        self._memory.write(blocks_T, offsets_T, states_T, inputs.tokens_T)
        return states_T

    def _read(self, inputs: _Inputs, written_T: U64) -> _Read:
        """`written_T`: the states that must lie at the positions of the new tokens."""
        size = self._size
        states_BS, tokens_BS, fits_BS = self._memory.read(inputs.blocks_B)
        states, tokens = states_BS.reshape(-1), tokens_BS.reshape(-1)
        nth_B = np.arange(len(inputs.blocks_B)) - inputs.first_R[inputs.rows_B]
        positions_BS = nth_B[:, None] * size + self._offsets
        used = (positions_BS < inputs.ends_R[inputs.rows_B][:, None]).reshape(-1)
        sound = fits_BS.reshape(-1) & chain(
            states, tokens, positions_BS.reshape(-1).astype(np.uint64), inputs.first_R * size
        )
        begins_R = inputs.first_R * size
        bad_R = np.logical_or.reduceat(used & ~sound, begins_R)
        bad_R[inputs.rows_T[states[begins_R[inputs.rows_T] + inputs.positions_T] != written_T]] = True
        stops_R = np.logical_or.reduceat(used & (tokens == STOP), begins_R)
        return _Read(states, tokens, bad_R, stops_R)

    def _poison(self, inputs: _Inputs, read: _Read) -> None:
        """What was computed from wrong KV stays wrong, also when the KV before it is put right later."""
        bad_T = read.bad_R[inputs.rows_T]
        blocks, offsets = inputs.places_T[0][bad_T], inputs.places_T[1][bad_T]
        states = self._memory.state(blocks, offsets) + np.uint64(POISON)
        self._memory.write(blocks, offsets, states, inputs.tokens_T[bad_T])

    def _answer(self, plan: StepPlan, inputs: _Inputs, read: _Read) -> StepResult:
        ends = inputs.first_R * self._size + inputs.ends_R
        favourites = favourite_array(read.states[ends - 1]).tolist()
        bad, stops = read.bad_R.tolist(), read.stops_R.tolist()
        sampled: list[int | None] = [None] * len(plan.rows)
        logprobs: dict[int, TokenLogprobs] = {}
        prompts: dict[int, tuple[TokenLogprobs, ...]] = {}
        ruled_out = set()
        forced: dict[int, tuple[int, ...]] = {}
        allowed = self._allowed(plan, inputs.lost.union(np.flatnonzero(read.bad_R).tolist()))
        for index, row in enumerate(plan.rows):
            if row.prompt_logprobs is not None:
                prompts[index] = self._of_prompt(row, index, inputs, read)
            spec = row.sample
            self._last_tokens[row.slot] = _NO_TOKEN
            if spec is None or index in inputs.lost:
                continue
            assert spec.position == row.start + row.num_tokens, f"{spec} after {row.start} + {row.num_tokens}"
            simple = spec.rules is None and spec.guide is None and spec.temperature == 0 and spec.logprobs is None
            if simple and not bad[index] and not stops[index]:
                token: int | None = favourites[index]
            else:
                begin = int(inputs.first_R[index]) * self._size
                known: list[int] = read.tokens[begin : int(ends[index])].tolist()
                guess = Guess(favourites[index], BAD if bad[index] else first_of(known) if stops[index] else None)
                token = BAD if bad[index] else choose(guess, spec, known, allowed.get(index))
                if token is None:
                    ruled_out.add(index)
                    continue
                if spec.logprobs is not None:
                    logprobs[index] = guess.told(token, spec.logprobs)
            assert token is not None
            sampled[index] = self._last_tokens[row.slot] = token
            if spec.guide is not None and (tokens := spec.guide.accept(spec.position, token)):
                forced[index] = tokens
        faults = inputs.lost | ruled_out
        prompts = {index: told for index, told in prompts.items() if index not in faults}
        return StepResult(plan.step_id, tuple(sampled), logprobs, prompts, faults, frozenset(ruled_out), forced)

    def _allowed(self, plan: StepPlan, passed_over: Set[int]) -> Mapping[int, Allowed]:
        """Whether a token may come, by what the rows' guides say; not of those where everything may."""
        guided = [
            (index, spec.guide, spec.position)
            for index, row in enumerate(plan.rows)
            if (spec := row.sample) is not None and spec.guide is not None and index not in passed_over
        ]
        if not guided:
            return {}
        masks_MW = np.empty((len(guided), mask_words(VOCAB_SIZE)), np.int32)
        fill_masks([(guide, position) for _, guide, position in guided], masks_MW.data.cast("B"))
        allowed_MV = np.unpackbits(masks_MW.view(np.uint8), axis=1, count=VOCAB_SIZE, bitorder="little").view(np.bool_)
        return {index: allowed_V for (index, _, _), allowed_V in zip(guided, allowed_MV, strict=True)}

    def _of_prompt(self, row: StepRow, index: int, inputs: _Inputs, read: _Read) -> tuple[TokenLogprobs, ...]:
        assert row.tokens is not None, "a prompt's token cannot come from the slot"
        assert row.prompt_logprobs is not None
        begin = int(inputs.first_R[index]) * self._size
        states = read.states[begin + row.start : begin + row.start + row.num_tokens]
        known: list[int] = read.tokens[begin : begin + row.start + row.num_tokens].tolist()
        told = []
        tokens = [*row.tokens[1:], *(() if row.next_token is None else (row.next_token,))]
        for at, (favourite, token) in enumerate(zip(favourite_array(states).tolist(), tokens, strict=False)):
            first = BAD if read.bad_R[index] else first_of(known[: row.start + at + 1])
            told.append(Guess(favourite, first).told(token, row.prompt_logprobs))
        return tuple(told)
