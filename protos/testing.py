"""Fakes of the Protocols in ports.py, for tests and for measuring without a model. No torch, no threads, no time.

`EchoRunner` makes wrong KV visible: its next token is a hash of every token that it finds in the row's blocks, so a
wrong block, a stale slot or a misplaced position changes the output. `FakeSender` and `FakeReceiver` do nothing by
themselves: the test decides when a transfer moves and hands the event to the worker; both assert the worker's side of
the contract.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from .constraint import Guide, mask_words
from .errors import DiptychError, TransferError
from .ports import Closed, Committed, Failed, Released, StepCost, WantBlocks
from .step import LogitRules, SampleSpec, StepPlan, StepResult, StepRow
from .types import EngineRef, Finish, PromptLogprobs, StepOutput, TokenLogprobs, TransferKey

ECHO_VOCAB = 32_000
Cell = tuple[int, int]  # (position, token id): what a real engine would compute K and V from
EMPTY: Cell = (-1, -1)
GARBAGE: Cell = (-2, -2)


class RequestFields(TypedDict, total=False):
    """Fields of GenerateRequest that a bench passes on."""

    salt: bytes
    deadline: float | None
    priority: int
    tenant: str
    weight: float
    resume: tuple[int, ...]


class FakeClock:
    """A clock that stands still unless told."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time that was set."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`."""
        self.now += seconds


class Ledger:
    """What an engine emitted, as the router would see it. An Emit that asserts what every worker promises:
    one Finish per key, nothing after it, token indexes and prompt positions without gaps or repetition.
    """

    def __init__(self) -> None:
        self.resumed: dict[TransferKey, int] = {}  # to be set: with how many tokens of its answer a request came
        self.tokens: dict[TransferKey, list[int]] = {}
        self.first_index: dict[TransferKey, int] = {}
        self.finishes: dict[TransferKey, Finish] = {}
        self.logprobs: dict[TransferKey, list[TokenLogprobs]] = {}  # of the tokens, where they came with them
        self.prompt_logprobs: dict[TransferKey, list[TokenLogprobs]] = {}  # of prompt positions 1, 2, ...

    def __call__(self, out: StepOutput) -> None:
        """Book one output."""
        assert out, "an empty output was emitted"
        assert len(out.keys) == len(out.indexes) == len(out.tokens)
        assert all(0 <= row < len(out.keys) for row in out.logprobs)
        for told in out.prompt_logprobs:
            self._book_prompt(told)
        for row, (key, index, token) in enumerate(zip(out.keys, out.indexes, out.tokens, strict=True)):
            assert key not in self.finishes, f"{key}: a token after the finish"
            first = self.first_index.setdefault(key, index)
            tokens = self.tokens.setdefault(key, [])
            assert first - self.resumed.get(key, 0) in {0, 1}, f"{key}: the first token has index {first}"
            assert index == first + len(tokens), f"{key}: token {index} after {len(tokens)} from {first}"
            tokens.append(token)
            if row in out.logprobs:
                self.logprobs.setdefault(key, []).append(out.logprobs[row])
        for finish in out.finishes:
            assert finish.key not in self.finishes, f"{finish.key}: a second finish"
            self.finishes[finish.key] = finish

    def _book_prompt(self, told: PromptLogprobs) -> None:
        assert told.key not in self.finishes, f"{told.key}: prompt logprobs after the finish"
        assert told.key not in self.tokens, f"{told.key}: prompt logprobs after a token"
        booked = self.prompt_logprobs.setdefault(told.key, [])
        assert told.first == 1 + len(booked), f"{told.key}: prompt logprobs from {told.first} after {len(booked)}"
        assert told.logprobs, f"{told.key}: empty prompt logprobs"
        booked.extend(told.logprobs)


def snapshot(plan: StepPlan) -> tuple[tuple[object, ...], ...]:
    """A plan as plain values that stay as they are, to compare schedules; guides, which do not, left out."""
    return tuple(
        (row.slot, row.start, row.tokens, tuple(row.blocks), _plain(row.sample), row.prompt_logprobs, row.next_token)
        for row in plan.rows
    )


def _plain(sample: SampleSpec | None) -> SampleSpec | None:
    return sample if sample is None or sample.guide is None else replace(sample, guide=None)


def _echo(cells: Sequence[Cell], vocab_size: int) -> int:
    flat = [number for cell in cells for number in cell]
    digest = hashlib.blake2b(struct.pack(f"<{len(flat)}q", *flat), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab_size


def _obey(rules: LogitRules | None, token: int, num_generated: int, vocab_size: int) -> int | None:
    """The next token that the rules allow, or None; bad words of one token count only.

    The echo has no probabilities, so penalties and bias change nothing.
    """
    if rules is None:
        return token
    barred = {word[0] for word in rules.bad_words if len(word) == 1}
    if num_generated < rules.min_tokens:
        barred.update(rules.stop_token_ids)
    if rules.allowed_token_ids is not None:
        allowed = [one for one in rules.allowed_token_ids if one not in barred]
        return allowed[token % len(allowed)] if allowed else None
    return next((one for at in range(vocab_size) if (one := (token + at) % vocab_size) not in barred), None)


def _follow(guide: Guide, position: int, guess: int, vocab_size: int) -> int | None:
    """The first token from `guess` on, ids wrapping around, that a guide allows."""
    mask = bytearray(4 * mask_words(vocab_size))
    guide.fill(position, memoryview(mask))
    allowed = int.from_bytes(mask, "little") & (1 << vocab_size) - 1
    if behind := allowed >> guess << guess:
        allowed = behind
    return (allowed & -allowed).bit_length() - 1 if allowed else None


GuideRule = Callable[[tuple[int, ...]], tuple[Collection[int], tuple[int, ...]]]


def talkative(known: tuple[int, ...]) -> tuple[Collection[int], tuple[int, ...]]:
    """A rule without sense: one to fifty ids, and after every third token up to five that are certain. Always some."""

    def number(what: str) -> int:
        return zlib.crc32(repr((what, known)).encode())

    allowed = {number(f"a{at}") % ECHO_VOCAB for at in range(1 + number("size") % 50)}
    count = number("run") % 6 if number("turn") % 3 == 0 else 0
    return allowed, tuple(number(f"f{at}") % ECHO_VOCAB for at in range(count))


class FakeGuide:
    """constraint.Guide after a rule: what may follow the answer's tokens so far, and what is certain to."""

    def __init__(self, num_prompt: int, rule: GuideRule, resume: Sequence[int] = ()) -> None:
        self.error: DiptychError | None = None
        self.known: list[int] = []
        self._num_prompt = num_prompt
        self._rule = rule
        for at, token in enumerate(resume):
            self.accept(num_prompt + at, token)

    def accept(self, position: int, token: int) -> tuple[int, ...]:
        """See constraint.Guide; what a rule does not allow is a defect of the caller."""
        at = position - self._num_prompt
        if at < len(self.known):
            assert self.known[at] == token, f"token {at} is {self.known[at]}, not {token}"
            return ()
        assert at == len(self.known), f"token {at} after {len(self.known)}"
        assert token in self._rule(tuple(self.known))[0], f"token {at}, {token}, is not allowed"
        self.known.append(token)
        forced = self._rule(tuple(self.known))[1]
        self.known.extend(forced)
        return forced

    def fill(self, position: int, mask: memoryview) -> None:
        """See constraint.Guide."""
        at = position - self._num_prompt
        if at > len(self.known):
            mask[:] = b"\xff" * len(mask)
            return
        mask[:] = bytes(len(mask))
        for token in self._rule(tuple(self.known))[0] if at == len(self.known) else (self.known[at],):
            mask[token // 8] |= 1 << token % 8


def _logprobs(guess: int, token: int, top: int, vocab_size: int) -> TokenLogprobs:
    rank = 1 + (token - guess) % vocab_size
    return TokenLogprobs(-float(rank), rank, tuple(((guess + at) % vocab_size, -1.0 - at) for at in range(top)))


def echo_reference(
    prompt: Sequence[int],
    n: int,
    vocab_size: int = ECHO_VOCAB,
    *,
    rules: LogitRules | None = None,
    resume: Sequence[int] = (),
    rule: GuideRule | None = None,
) -> list[int]:
    """The `n` tokens that one undisturbed EchoRunner generates after `prompt` and `resume`; fewer where a guide of this
    `rule` comes to allow nothing.
    """
    cells = list(enumerate([*prompt, *resume]))
    guide = None if rule is None else FakeGuide(len(prompt), rule, resume)
    for at in range(len(resume), len(resume) + n):
        guess = _echo(cells, vocab_size)
        if guide is None:
            token = _obey(rules, guess, at, vocab_size)
            assert token is not None, "the rules leave no token"
        elif (token := _follow(guide, len(cells), guess, vocab_size)) is None:
            break
        else:
            guide.accept(len(cells), token)
        cells.append((len(cells), token))
    return [token for _, token in cells[len(prompt) + len(resume) :]]


def echo_logprobs(before: Sequence[int], token: int, top: int, vocab_size: int = ECHO_VOCAB) -> TokenLogprobs:
    """What an EchoRunner tells of `token` after the ids `before`: it is sure of its guess, less of the ids above it."""
    return _logprobs(_echo(list(enumerate(before)), vocab_size), token, top, vocab_size)


@dataclass(slots=True)
class _Launched:
    """A step of an EchoRunner that was not collected yet."""

    plan: StepPlan  # as it was given: its block tables may have grown since, and nothing else
    kept: StepPlan  # as it was when it was launched
    poisoned: frozenset[int]
    fails: bool
    is_computed: bool = False
    result: StepResult | None = None


class EchoRunner:
    """ports.Runner without a model: KV of a position is the pair (position, token id), one per block and offset.

    With depth 1 a step is computed when it is launched, else when it is collected, as late as can be: whoever gives
    away a block or looks for a result too early finds something else. `observe` is called with each plan that is
    launched. `fault` makes the next step raise, in launch or in collect, once, after writing garbage where the step
    would have written KV. Rows for which `poison` is true come back among the faults, with garbage in their blocks; so
    do those that go on from a slot whose last row sampled nothing.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_tokens: int,
        max_slots: int = 64,
        max_step_tokens: int = 512,
        vocab_size: int = ECHO_VOCAB,
        depth: int = 1,
    ) -> None:
        self.max_slots = max_slots
        self.max_step_tokens = max_step_tokens
        self.vocab_size = vocab_size
        self.depth = depth
        self.cost: StepCost | None = None
        self.block_tokens = block_tokens
        self.fault: Literal["launch", "collect"] | None = None
        self.observe: Callable[[StepPlan], None] | None = None
        self.poison: Callable[[StepRow], bool] | None = None
        self.num_faults = 0  # raised on demand; a worker that counts more broke the contract of a plan
        self._kv: list[list[Cell]] = [[EMPTY] * block_tokens for _ in range(num_blocks)]
        self._last_token: dict[int, int] = {}  # by slot
        self._history: dict[int, list[int]] = {}  # by slot, where the rules need it
        self._outstanding: deque[_Launched] = deque()

    def max_runs(self, rows: int) -> int:
        """All of them."""
        return rows

    def launch(self, plan: StepPlan) -> None:
        """A plan that breaks the contract raises AssertionError."""
        self._check(plan)
        if self.observe is not None:
            self.observe(plan)
        fault, self.fault = self.fault, None
        self.num_faults += fault is not None
        poisoned = frozenset(at for at, row in enumerate(plan.rows) if self.poison is not None and self.poison(row))
        kept = replace(plan, rows=tuple(replace(row, blocks=tuple(row.blocks)) for row in plan.rows))
        step = _Launched(plan, kept, poisoned, fails=fault is not None)
        if fault == "launch":
            for older in (*self._outstanding, step):
                self._compute(older)
            raise RuntimeError("injected fault in launch")
        self._outstanding.append(step)
        if self.depth == 1:
            self._compute(step)

    def _compute(self, step: _Launched) -> None:
        if step.is_computed:
            return
        step.is_computed = True
        faults = set(step.poisoned)
        for at, (told, row) in enumerate(zip(step.plan.rows, step.kept.rows, strict=True)):
            assert tuple(told.blocks[: len(row.blocks)]) == row.blocks, f"blocks changed under a step: {row}"
            last = self._last_token.pop(row.slot, None)
            if row.tokens is None and last is None:
                faults.add(at)
            tokens = (last,) if row.tokens is None else row.tokens
            cells = [
                GARBAGE if step.fails or at in faults or token is None else (position, token)
                for position, token in enumerate(tokens, row.start)
            ]
            self.write(row.blocks, row.start, cells)
        step.result = None if step.fails else self._result(step.kept, frozenset(faults))

    def _result(self, plan: StepPlan, faults: frozenset[int]) -> StepResult:
        sampled: list[int | None] = [None] * len(plan.rows)
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        ruled_out = set()
        forced: dict[int, tuple[int, ...]] = {}
        for at, row in enumerate(plan.rows):
            if at in faults:
                continue
            if row.prompt_logprobs is not None:
                prompt_logprobs[at] = self._of_prompt(row, row.prompt_logprobs)
            if row.sample is None:
                continue
            cells = self.read(row.blocks, row.sample.position)
            guess, rules = _echo(cells, self.vocab_size), row.sample.rules
            num_generated = 0 if rules is None else row.sample.position - rules.num_prompt
            token = _obey(rules, guess, num_generated, self.vocab_size)
            if row.sample.guide is not None:
                token = _follow(row.sample.guide, row.sample.position, guess, self.vocab_size)
            if token is None:
                ruled_out.add(at)
                prompt_logprobs.pop(at, None)
                continue
            if rules is not None and rules.needs_history:
                self._keep_history(row, cells, token)
            if row.sample.logprobs is not None:
                logprobs[at] = _logprobs(guess, token, row.sample.logprobs, self.vocab_size)
            self._last_token[row.slot] = sampled[at] = token
            if row.sample.guide is not None and (tokens := row.sample.guide.accept(row.sample.position, token)):
                forced[at] = tokens
        return StepResult(
            plan.step_id, tuple(sampled), logprobs, prompt_logprobs, faults | ruled_out, frozenset(ruled_out), forced
        )

    def _of_prompt(self, row: StepRow, top: int) -> tuple[TokenLogprobs, ...]:
        cells = self.read(row.blocks, row.start + row.num_tokens)
        known = [token for _, token in cells] + ([] if row.next_token is None else [row.next_token])
        return tuple(
            _logprobs(_echo(cells[:at], self.vocab_size), known[at], top, self.vocab_size)
            for at in range(row.start + 1, len(known))
        )

    def _keep_history(self, row: StepRow, cells: list[Cell], token: int) -> None:
        """A slot's life begins with a history; from then on the slot's own must be that of the sequence. Nothing can be
        said of a row behind a step that failed: it was launched before anybody knew.
        """
        assert row.sample is not None
        if row.sample.history is not None:
            self._history[row.slot] = list(row.sample.history)
        known = [known for _, known in cells]
        is_other = GARBAGE not in cells and self._history.get(row.slot) != known
        assert not is_other, f"slot {row.slot} has the history of another sequence"
        self._history.setdefault(row.slot, known).append(token)

    def collect(self) -> StepResult:
        """The oldest step's tokens."""
        step = self._outstanding.popleft()
        self._compute(step)
        if step.result is None:
            raise RuntimeError("injected fault in collect")
        return step.result

    def idle(self) -> bool:
        """Nothing."""
        return False

    def read(self, blocks: Sequence[int], num_tokens: int) -> list[Cell]:
        """What lies at positions 0 .. num_tokens - 1 of a block table."""
        size = self.block_tokens
        return [self._kv[blocks[at // size]][at % size] for at in range(num_tokens)]

    def write(self, blocks: Sequence[int], start: int, cells: Sequence[Cell]) -> None:
        """Put cells at positions start, start + 1, ... of a block table, as a step or a transfer would."""
        for at, cell in enumerate(cells, start):
            self._kv[blocks[at // self.block_tokens]][at % self.block_tokens] = cell

    def _check(self, plan: StepPlan) -> None:
        assert len(self._outstanding) < 2, "a third step was launched"
        assert plan.rows, "an empty step"
        assert plan.num_tokens <= self.max_step_tokens, plan.num_tokens
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), slots
        assert all(0 <= slot < self.max_slots for slot in slots), slots
        written: set[int] = set()
        for row in plan.rows:
            stop = row.start + row.num_tokens
            assert row.num_tokens == (1 if row.tokens is None else len(row.tokens)) > 0, row
            assert len(row.blocks) * self.block_tokens >= stop, row
            assert row.sample is None or row.sample.position == stop, row
            into = set(row.blocks[row.start // self.block_tokens : (stop - 1) // self.block_tokens + 1])
            assert not into & written, f"two rows write into one block: {row}"
            written |= into


@dataclass(slots=True)
class Sending:
    """What a FakeSender was told about one transfer."""

    peer: EngineRef
    num_tokens: int
    upto: int = 0
    blocks: tuple[int, ...] = ()
    content: list[Cell] = field(default_factory=list)  # of positions 0 .. upto - 1, as first announced
    first_token: int | None = None
    final: bool = False
    aborted: DiptychError | None = None


class FakeSender:
    """ports.SendPort, scripted. With a runner it checks that announced KV stays untouched until `release`."""

    def __init__(self, runner: EchoRunner | None = None) -> None:
        self.transfers: dict[TransferKey, Sending] = {}  # not released yet
        self._runner = runner
        self._seen: set[TransferKey] = set()

    def open(self, key: TransferKey, peer: EngineRef, num_tokens: int) -> None:
        """See ports.SendPort."""
        assert key not in self._seen, f"{key} was opened twice"
        self._seen.add(key)
        self.transfers[key] = Sending(peer, num_tokens)

    def computed(self, key: TransferKey, upto: int, blocks: Sequence[int]) -> None:
        """See ports.SendPort."""
        sending = self.transfers[key]
        assert sending.aborted is None
        assert sending.first_token is None
        assert sending.upto < upto <= sending.num_tokens, (sending.upto, upto)
        if self._runner is not None:
            content = self._runner.read(blocks, upto)
            assert content[: sending.upto] == sending.content, "announced KV changed"
            assert [position for position, _ in content] == list(range(upto)), "KV is not where it should be"
            sending.content = content
        sending.upto, sending.blocks = upto, tuple(blocks)

    def finish(self, key: TransferKey, first_token: int, *, final: bool) -> None:
        """See ports.SendPort."""
        sending = self.transfers[key]
        assert sending.aborted is None
        assert sending.first_token is None
        assert final or sending.upto == sending.num_tokens, "finished before all KV was announced"
        sending.first_token, sending.final = first_token, final

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        """See ports.SendPort."""
        if key in self.transfers and self.transfers[key].aborted is None:
            self.transfers[key].aborted = error

    def release(self, key: TransferKey, error: DiptychError | None = None) -> Released:
        """End a transfer: with `error`, with what it was aborted with, or well."""
        sending = self.transfers.pop(key)
        error = error or sending.aborted
        assert error is not None or sending.first_token is not None, "a transfer cannot end well before token 0"
        if self._runner is not None:
            assert self._runner.read(sending.blocks, sending.upto) == sending.content, "KV changed while it was read"
        size = 0 if error or sending.final else 100 * sending.num_tokens
        return Released(key, error, size_bytes=size, seconds=0.25, transport="fake")


@dataclass(slots=True)
class Receiving:
    """What a FakeReceiver was told about one transfer."""

    peer: EngineRef
    num_tokens: int
    have_tokens: int
    wanted: bool = False
    blocks: tuple[int, ...] | None = None
    aborted: DiptychError | None = None


class FakeReceiver:
    """ports.ReceivePort, scripted. With a runner, `commit` writes the prompt's KV into the granted blocks."""

    def __init__(self, runner: EchoRunner | None = None) -> None:
        self.transfers: dict[TransferKey, Receiving] = {}  # not ended yet
        self.grants: list[TransferKey] = []  # in order
        self._runner = runner
        self._seen: set[TransferKey] = set()

    def expect(self, key: TransferKey, peer: EngineRef, num_tokens: int, have_tokens: int) -> None:
        """See ports.ReceivePort."""
        assert key not in self._seen, f"{key} was expected twice"
        assert 0 <= have_tokens <= num_tokens
        self._seen.add(key)
        self.transfers[key] = Receiving(peer, num_tokens, have_tokens)

    def grant(self, key: TransferKey, blocks: Sequence[int]) -> None:
        """See ports.ReceivePort."""
        receiving = self.transfers[key]
        assert receiving.wanted
        assert receiving.blocks is None
        assert receiving.aborted is None
        assert len(set(blocks)) == len(blocks)
        receiving.blocks = tuple(blocks)
        self.grants.append(key)
        self.scribble()

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        """See ports.ReceivePort."""
        if key in self.transfers and self.transfers[key].aborted is None:
            self.transfers[key].aborted = error

    def scribble(self) -> None:
        """Write garbage into whatever was granted and not ended: late writes of a transfer that is under way."""
        for receiving in self.transfers.values():
            if receiving.blocks is not None and self._runner is not None:
                garbage = [GARBAGE] * (receiving.num_tokens - receiving.have_tokens)
                self._runner.write(receiving.blocks, receiving.have_tokens, garbage)

    def want(self, key: TransferKey) -> WantBlocks:
        """The first chunk is announced."""
        receiving = self.transfers[key]
        assert not receiving.wanted
        receiving.wanted = True
        return WantBlocks(key)

    def commit(self, key: TransferKey, prompt: Sequence[int], first_token: int, *, final: bool = False) -> Committed:
        """All chunks arrived (`final`: none was needed). Legal after an abort too: it was on its way already."""
        receiving = self.transfers.pop(key)
        if not final and receiving.have_tokens < receiving.num_tokens:
            assert receiving.blocks is not None, "nothing was granted"
            if self._runner is not None:
                cells = list(enumerate(prompt))[receiving.have_tokens :]
                self._runner.write(receiving.blocks, receiving.have_tokens, cells)
        size = 0 if final else 100 * (receiving.num_tokens - receiving.have_tokens)
        return Committed(key, first_token, final, size_bytes=size, seconds=0.25, transport="fake")

    def fail(self, key: TransferKey, error: DiptychError | None = None) -> Failed:
        """The transfer ends without a copy."""
        self.scribble()
        del self.transfers[key]
        return Failed(key, error or TransferError("the transfer failed"))

    def close(self, key: TransferKey) -> Closed:
        """The abort that the worker asked for is complete."""
        assert self.transfers[key].aborted is not None, "closed without an abort"
        self.scribble()
        del self.transfers[key]
        return Closed(key)
