"""What a model's steps take on a card by one decoder and by another: deterministic or not, by hand or by transformers.

For benches. Steps are whole: the work list, all layers and the head, in a graph where one can hold them, over an arena
of random numbers of the size that such a step has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from ..device.step import StepTensors
from ..ops.measure import microseconds
from ..ops.paged_attention.split import allocate, plan_splits
from . import DeviceDecoder

if TYPE_CHECKING:
    from ..model import LoadedModel

_BLOCK_TOKENS = 16
_ROUNDS = 5
_SHARE_OF_FREE = 0.8  # of the card's memory, for an arena


class StepCase(NamedTuple):
    """`rows` alike, each with `new` tokens behind `before`."""

    rows: int
    before: int
    new: int

    @property
    def name(self) -> str:
        """For people."""
        if self.new == 1:
            return f"decode {self.rows} x {self.before + 1}"
        return f"prompt {self.rows} x {self.new}" + (f" behind {self.before}" if self.before else "")


CASES: Final = (
    StepCase(1, 1023, 1),
    StepCase(64, 1023, 1),
    StepCase(512, 255, 1),
    StepCase(1, 16_383, 1),
    StepCase(1, 0, 2048),
    StepCase(16, 0, 512),
)


class Compared(NamedTuple):
    """A step by both."""

    case: StepCase
    us: float
    other_us: float

    @property
    def ratio(self) -> float:
        """How many times as long the other takes."""
        return self.other_us / self.us


def deterministic_cost(model: LoadedModel, cases: Sequence[StepCase] = CASES) -> list[Compared]:
    """The steps of a hand-written model that is not deterministic, and the same steps if it were (`other_us`).

    Cases beyond its context, or for whose KV the card has no room, are left out. Its weights are shared; it must not
    compute meanwhile.
    """
    made = model.by_hand
    assert made is not None
    tokens = max(case.rows * case.new for case in cases)
    plain = _times(model, made.decoder(max_tokens=tokens), cases, invariant=False)
    fixed = _times(model, made.decoder(max_tokens=tokens, deterministic=True), cases, invariant=True)
    return [Compared(case, plain[case], fixed[case]) for case in cases if case in plain and case in fixed]


def generic_cost(by_hand: LoadedModel, generic: LoadedModel, cases: Sequence[StepCase] = CASES) -> list[Compared]:
    """The steps of a model by hand-written code, and by transformers' forward (`other_us`), for which it is
    loaded once more without `by_hand`.
    """
    tokens = max(case.rows * case.new for case in cases)
    mine = _times(by_hand, by_hand.decoder(max_tokens=tokens), cases, invariant=by_hand.deterministic)
    theirs = _times(generic, generic.decoder(max_tokens=tokens), cases, invariant=False)
    return [Compared(case, mine[case], theirs[case]) for case in cases if case in mine and case in theirs]


def _times(
    model: LoadedModel, decoder: DeviceDecoder, cases: Sequence[StepCase], *, invariant: bool
) -> dict[StepCase, float]:
    """Microseconds of each case that fits."""
    found = {}
    with torch.inference_mode():
        for case in cases:
            if case.before + case.new <= model.max_context_tokens and _has_room(model, case):
                step = step_of(model, case, invariant=invariant)
                found[case] = _step_us(model, decoder, step, _arena(model, case))
                torch.cuda.empty_cache()
    return found


def _step_us(
    model: LoadedModel, decoder: DeviceDecoder, step: StepTensors, kv: Sequence[tuple[Tensor, Tensor]]
) -> float:
    logits_NV = torch.empty(len(step.kept_N), model.vocab_size, dtype=kv[0][0].dtype, device=model.device)

    def run() -> None:
        plan_splits(step)
        decoder.forward(step, kv, logits_NV)

    if decoder.capturable:
        try:
            return microseconds([run], _ROUNDS)
        except RuntimeError:  # found out by trying, as by the runner
            torch.cuda.synchronize()
    return _launched_us(run)


def _launched_us(run: Callable[[], None]) -> float:
    """Without a graph: the host's time counts, where it takes longer."""
    seconds = []
    for _ in range(_ROUNDS + 1):  # the first may compile
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) * 1e6


def _blocks_each(case: StepCase) -> int:
    return -(-(case.before + case.new) // _BLOCK_TOKENS)


def _has_room(model: LoadedModel, case: StepCase) -> bool:
    free, _ = torch.cuda.mem_get_info(model.device)
    numbers = 2 * model.layers * model.kv_heads * model.head_dim * case.rows * _blocks_each(case) * _BLOCK_TOKENS
    return numbers * (4 if model.dtype == "float32" else 2) < _SHARE_OF_FREE * free


def _arena(model: LoadedModel, case: StepCase) -> list[tuple[Tensor, Tensor]]:
    shape = (case.rows * _blocks_each(case), model.kv_heads, _BLOCK_TOKENS, model.head_dim)

    def blocks() -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, model.dtype), device=model.device).normal_()

    return [(blocks(), blocks()) for _ in range(model.layers)]


def step_of(model: LoadedModel, case: StepCase, *, invariant: bool) -> StepTensors:
    """A step of the case, with random tokens and blocks in random order, on the model's device."""
    rows, before, new = case
    device, each, tokens = model.device, _blocks_each(case), rows * new
    generator = torch.Generator(device).manual_seed(tokens)
    table_RB = torch.randperm(rows * each, generator=generator, device=device).view(rows, each)
    position_RN = (before + torch.arange(new, device=device)).expand(rows, new)
    slots_RN = table_RB.gather(1, position_RN // _BLOCK_TOKENS) * _BLOCK_TOKENS + position_RN % _BLOCK_TOKENS
    row_R = torch.arange(rows, device=device)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * new
    is_decode = new == 1
    return StepTensors(
        ids_T=torch.randint(model.vocab_size, (tokens,), generator=generator, device=device).int(),
        positions_T=position_RN.reshape(-1).int(),
        slot_mapping_T=slots_RN.reshape(-1),
        row_T=row_R.repeat_interleave(new).int(),
        query_start_R=starts,
        seq_len_R=torch.full((rows,), before + new, dtype=torch.int32, device=device),
        slot_R=row_R.int(),
        blocks_SB=table_RB.int(),
        kept_N=starts[1:].long() - 1,
        flags_R=torch.zeros(rows, dtype=torch.int32, device=device),
        splits=allocate(
            max_rows=rows,
            max_tokens=tokens,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            windows=model.windows,
            like=torch.empty(0, dtype=getattr(torch, model.dtype), device=device),
            invariant=invariant,
        ),
        num_tokens=tokens,
        decode_rows=rows if is_decode else 0,
        prompt_rows=0 if is_decode else rows,
        most_prompt=0 if is_decode else new,
        block_tokens=_BLOCK_TOKENS,
    )
