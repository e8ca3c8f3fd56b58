"""ports.Runner of the simulation: KV of a position is a hash of the whole prefix, the next token a hash of all KV.

One number per position; whoever finds another number there than the prefix's finds it in the next token, too.
"""

from __future__ import annotations

import functools
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diptych.protos.ports import StepCost
from diptych.protos.step import StepPlan, StepResult, StepRow

VOCAB = 64
STOP_TOKEN = 7
POISON_SEED = 666  # of a request over which every step fails
EMPTY = 0
_MASK = (1 << 64) - 1


def grow(before: int, tokens: Sequence[int], start: int) -> list[int]:
    """KV of `tokens` from position `start` on, after the position whose KV is `before`."""
    found = []
    for at, token in enumerate(tokens, start):
        before = (before * 6364136223846793005 + (token + 1) * 1442695040888963407 + at) & _MASK | 1
        found.append(before)
    return found


@functools.lru_cache(maxsize=4096)
def kv_of(tokens: tuple[int, ...]) -> list[int]:
    """What must lie at positions 0 .. len(tokens) - 1."""
    return grow(1, tokens, 0)


def next_token(cells: Sequence[int]) -> int:
    """After these positions."""
    return hash(tuple(cells)) % VOCAB  # hashes of whole numbers are the same in every interpreter


def answer_of(prompt: tuple[int, ...], *, max_tokens: int, stop: bool) -> list[int]:
    """The one right answer."""
    cells, tokens = list(kv_of(prompt)), []
    while len(tokens) < max_tokens:
        tokens.append(next_token(cells))
        if stop and tokens[-1] == STOP_TOKEN:
            break
        cells += grow(cells[-1], tokens[-1:], len(cells))
    return tokens


def pack(cells: Sequence[int]) -> bytes:
    """Wire form, 8 bytes a position."""
    return struct.pack(f"<{len(cells)}Q", *cells)


def unpack(data: bytes | memoryview) -> tuple[int, ...]:
    """From `pack`."""
    return struct.unpack(f"<{len(data) // 8}Q", data)


@dataclass(slots=True)
class _Step:
    """Launched. `blocks` as they were then: only what a table has gained since may differ."""

    plan: StepPlan
    blocks: list[tuple[int, ...]]
    fails: bool


class SimRunner:
    """The engine decides how long a step takes. Plans that make no sense raise AssertionError.

    With depth 1 a step is computed when it is launched, else when it is collected: as late as can be, so that whoever
    gives a block away too early, or believes too early in what lies there, is found out.
    """

    def __init__(
        self, *, num_blocks: int, block_tokens: int, max_slots: int, max_step_tokens: int, depth: int = 1
    ) -> None:
        self.max_slots = max_slots
        self.max_step_tokens = max_step_tokens
        self.vocab_size = VOCAB
        self.depth = depth
        self.cost: StepCost | None = None
        self.block_tokens = block_tokens
        self.fault = False  # the next step raises, after it has written garbage
        self.on_poison: Callable[[], None] | None = None  # a step that samples for the poison: called, then it raises
        self._kv = [[EMPTY] * block_tokens for _ in range(num_blocks)]
        self._last: dict[int, int] = {}  # token by slot
        self._launched: deque[_Step] = deque()
        self._results: deque[StepResult] = deque()

    def launch(self, plan: StepPlan) -> None:
        assert plan.rows
        assert plan.num_tokens <= self.max_step_tokens
        assert len(self._launched) + len(self._results) < 2, "a third step was launched"
        fault, self.fault = self.fault, False
        if self.on_poison and any(row.sample is not None and row.sample.seed == POISON_SEED for row in plan.rows):
            fault = True
            if not any(step.fault for step in self._launched):  # else that one fells both: nobody knew of it here
                self.on_poison()
        step = _Step(plan, [tuple(row.blocks) for row in plan.rows], fault)
        self._check(step)
        if self.depth == 1:
            self._results.append(self._compute(step))
        else:
            self._launched.append(step)

    def _check(self, step: _Step) -> None:
        size = self.block_tokens
        written: set[int] = set()
        for row, blocks in zip(step.plan.rows, step.blocks, strict=True):
            assert row.num_tokens == (1 if row.tokens is None else len(row.tokens))
            into = set(blocks[row.start // size : (row.start + row.num_tokens - 1) // size + 1])
            assert not into & written, "two rows write into one block"
            written |= into

    def _compute(self, step: _Step) -> StepResult:
        """Raises what was ordered. Rows whose token should come from a slot that has none are among the faults."""
        size, kv = self.block_tokens, self._kv
        faults = set()
        for at, (row, blocks) in enumerate(zip(step.plan.rows, step.blocks, strict=True)):
            assert tuple(row.blocks[: len(blocks)]) == blocks, "blocks changed under a step"
            last = self._last.pop(row.slot, None)
            tokens = row.tokens if row.tokens is not None else None if last is None else (last,)
            if tokens is None:
                faults.add(at)
            before = kv[blocks[(row.start - 1) // size]][(row.start - 1) % size] if row.start else 1
            garbage = step.fails or tokens is None
            cells = [~0 & _MASK] * row.num_tokens if garbage else grow(before, tokens or (), row.start)
            self.write(blocks, row.start, cells)
        if step.fails:
            raise RuntimeError("injected fault")
        sampled = []
        for at, (row, blocks) in enumerate(zip(step.plan.rows, step.blocks, strict=True)):
            token = None if at in faults else self._sample(row, blocks)
            sampled.append(token)
            if token is not None:
                self._last[row.slot] = token
        return StepResult(step.plan.step_id, tuple(sampled), faults=frozenset(faults))

    def _sample(self, row: StepRow, blocks: Sequence[int]) -> int | None:
        return None if row.sample is None else next_token(self.read(blocks, row.sample.position))

    def collect(self) -> StepResult:
        if self._launched:
            return self._compute(self._launched.popleft())
        return self._results.popleft()

    def max_runs(self, rows: int) -> int:
        return rows

    def idle(self) -> bool:
        return False

    def read(self, blocks: Sequence[int], num_tokens: int) -> list[int]:
        """What lies at positions 0 .. num_tokens - 1 of a block table."""
        cells: list[int] = []
        for block in blocks[: -(-num_tokens // self.block_tokens)]:
            cells += self._kv[block]
        return cells[:num_tokens]

    def write(self, blocks: Sequence[int], start: int, cells: Sequence[int]) -> None:
        """Put cells at positions start, start + 1, ... of a block table."""
        size, kv = self.block_tokens, self._kv
        for at, cell in enumerate(cells, start):
            kv[blocks[at // size]][at % size] = cell
