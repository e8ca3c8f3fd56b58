"""What tests of the device runner share: a decoder whose tokens are known beforehand, and a scheduler of a few lines
that may run ahead of what was read.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diptych.protos.step import SampleSpec, StepPlan, StepResult, StepRow

from ..models import DeviceDecoder
from .runner import DeviceOptions, DeviceRunner
from .state import DeviceState
from .step import KV_NOT_FINITE, StepTensors

BLOCK = 4
VOCAB = 97


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """What waits for the card raises RuntimeError meanwhile, as far as torch can tell."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def oracle(ids: Sequence[int]) -> int:
    """The greedy token after `ids`, whatever blocks, slots and steps they went through."""
    return (sum((token + 1) * (at + 3) for at, token in enumerate(ids)) * 7 + len(ids)) % VOCAB


class SumDecoder:
    """Keeps each token's id as its KV and sums them through the slot's blocks: any wrong id, position, block, length,
    slot or kept token gives another answer. Asks the device nothing, so that a graph can hold it.
    """

    capturable = True

    def __init__(self) -> None:
        self.fail = False  # the next forward raises

    def forward(self, step: StepTensors, kv: Sequence[tuple[Tensor, Tensor]], logits_NV: Tensor) -> None:
        """See models.DeviceDecoder; one layer of one head of one number."""
        if self.fail:
            raise ValueError("a wish")
        ((keys, _),) = kv
        flat = keys.view(-1)
        flat.index_copy_(0, step.slot_mapping_T, step.ids_T.float() + 1)
        rows_N = step.row_T[step.kept_N].long()
        length_N = step.positions_T[step.kept_N].long() + 1
        context = step.blocks_SB.shape[1] * step.block_tokens
        position_C = torch.arange(context, device=flat.device)
        blocks_NC = step.blocks_SB[step.slot_R[rows_N].long()][:, position_C // step.block_tokens].long()
        value_NC = flat[blocks_NC * step.block_tokens + position_C % step.block_tokens].double()
        seen_NC = position_C < length_N[:, None]
        sum_N = (torch.where(seen_NC, value_NC, 0.0) * (position_C + 3)).sum(dim=1)
        broken_R = torch.zeros_like(step.flags_R).index_add_(0, rows_N.int(), torch.isnan(sum_N).int()) > 0
        step.flags_R.bitwise_or_(broken_R.int() * KV_NOT_FINITE)
        token_N = (torch.nan_to_num(sum_N).long() * 7 + length_N) % VOCAB
        logits_NV.copy_(torch.arange(VOCAB, device=flat.device) == token_N[:, None])


def make_runner(
    device: torch.device,
    decoder: DeviceDecoder | None = None,
    *,
    slots: int = 8,
    context: int = 128,
    blocks: int = 256,
    step_tokens: int = 64,
    graphs: bool = True,
) -> tuple[DeviceRunner, Tensor]:
    """Over an arena of `blocks` blocks and a spare one, all zero; gives its keys, too."""
    shape = (blocks + 1, 1, BLOCK, 1)
    keys, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    state = DeviceState(
        max_slots=slots,
        max_context_tokens=context,
        block_tokens=BLOCK,
        spare_block=blocks,
        device=device,
        vocab_size=VOCAB,
    )
    runner = DeviceRunner(
        decoder or SumDecoder(),
        [(keys, values)],
        state=state,
        splits=None,
        max_step_tokens=step_tokens,
        vocab_size=VOCAB,
        options=DeviceOptions(graphs=graphs),
    )
    return runner, keys


@dataclass(eq=False)
class Request:
    """A sequence. `tokens` are those read; `pending` more are sampled but not read."""

    prompt: tuple[int, ...]
    slot: int
    blocks: list[int]
    new: int  # tokens that it wants
    spec: SampleSpec
    prompt_logprobs: int | None = None
    done: int = 0
    pending: int = 0
    tokens: list[int] = field(default_factory=list)
    has_sampled: bool = False

    @property
    def known(self) -> tuple[int, ...]:
        """Ids that the host has."""
        return (*self.prompt, *self.tokens)

    def next_row(self, limit: int) -> StepRow:
        """Its next positions, at most `limit`; the id comes from the slot where it was not read."""
        known = self.known
        total = len(known) + self.pending
        end = self.done + min(limit, total - self.done)
        ids = None if end > len(known) else known[self.done : end]
        spec = None
        if end == total:
            spec = replace(self.spec, position=end)
            if not self.has_sampled and spec.rules is not None and spec.rules.needs_history:
                spec = replace(spec, history=known)
            self.has_sampled = True
            self.pending += 1
        row = StepRow(
            slot=self.slot,
            num_tokens=end - self.done,
            tokens=ids,
            start=self.done,
            blocks=self.blocks,
            sample=spec,
            prompt_logprobs=self.prompt_logprobs if end <= len(self.prompt) else None,
            next_token=self.prompt[end] if end < len(self.prompt) and self.prompt_logprobs is not None else None,
        )
        self.done = end
        return row


GREEDY = SampleSpec(0.0, 1.0, 0, 0, 0)


class Storm:
    """Random plans over a few slots: prompts in chunks beside decoding rows, up to `depth` - 1 steps ahead of what was
    read. What a request leaves, its slot and its blocks, goes to others at once.
    """

    def __init__(
        self, seed: int, *, slots: int = 8, blocks: int = 256, step_tokens: int = 64, vocab: int = VOCAB, depth: int = 1
    ) -> None:
        self.rng = random.Random(seed)
        self.finished: list[Request] = []
        self._free = list(range(blocks))
        self.rng.shuffle(self._free)
        self._slots = list(range(slots))
        self._step_tokens, self._vocab, self._depth = step_tokens, vocab, depth
        self._running: list[Request] = []
        self._in_flight: list[list[Request | None]] = []
        self._step = 0

    @property
    def has_slot(self) -> bool:
        """Whether another request can start."""
        return bool(self._slots)

    def add(self, length: int, new: int, spec: SampleSpec = GREEDY, prompt_logprobs: int | None = None) -> None:
        """A request of `length` random ids that wants `new` tokens."""
        prompt = tuple(self.rng.randrange(self._vocab) for _ in range(length))
        need = -(-(length + new) // BLOCK)
        taken, self._free = self._free[:need], self._free[need:]
        slot = self._slots.pop(self.rng.randrange(len(self._slots)))
        self._running.append(Request(prompt, slot, taken, new, spec, prompt_logprobs))

    def turn(self, launch: Callable[[StepPlan], None], collect: Callable[[], StepResult]) -> bool:
        """Launch a step if there is one, then collect as the depth says. False: all requests have ended."""
        plan = self._plan()
        if plan is not None:
            launch(plan)
        while len(self._in_flight) > (self._depth - 1 if plan is not None else 0):
            self._take(collect())
        return bool(self._running)

    def _plan(self) -> StepPlan | None:
        wanting = [one for one in self._running if len(one.tokens) + one.pending < one.new]
        chosen = [one for one in wanting if self.rng.random() < 0.9] or wanting
        self.rng.shuffle(chosen)
        rows: list[StepRow] = []
        samplers: list[Request | None] = []
        left = self._step_tokens
        for one in chosen:
            if left:
                rows.append(row := one.next_row(self.rng.randint(1, left)))
                samplers.append(one if row.sample is not None else None)
                left -= row.num_tokens
        if not rows:
            return None
        self._in_flight.append(samplers)
        self._step += 1
        return StepPlan(self._step, tuple(rows))

    def _take(self, result: StepResult) -> None:
        assert not result.faults
        for one, token in zip(self._in_flight.pop(0), result.tokens, strict=True):
            assert (one is None) == (token is None)
            if one is not None and token is not None:
                one.tokens.append(token)
                one.pending -= 1
        for one in [one for one in self._running if len(one.tokens) == one.new]:
            self._running.remove(one)
            self.finished.append(one)
            self._slots.append(one.slot)
            self._free.extend(one.blocks)
