"""The runner: a step's plan in, one token per sampled row out. Called by the workers through the Protocol in ports.

The last token sampled for a slot stays here, so that the next step can be launched before the host has read this one.
On a CPU `launch` computes the step; its error, if any, is kept for `collect`.

logits of a step | sampled rows: their last positions | prompt logprobs: the positions before the tokens told |
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.protos.constraint import mask_words
from diptych.protos.errors import DiptychError, EngineFault
from diptych.protos.ports import StepCost
from diptych.protos.step import SampleSpec, StepPlan, StepResult, StepRow
from diptych.protos.types import TokenLogprobs

from .device.masks import accept, fill
from .history import TokenLog
from .model import LoadedModel
from .ops.logprobs.columns import Logprobs
from .ops.logprobs.launch import logprobs
from .ops.ragged import RaggedBatch, Segment, build_batch
from .ops.sampling.launch import sample

MAX_OUTSTANDING = 2


@dataclass(frozen=True, slots=True)
class _PromptRow:
    """A row of the plan whose prompt tokens are to be told."""

    row: int
    places: range  # in the logits, of the positions before these tokens
    tokens: list[int]
    top: int


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A plan, checked and laid out as one row."""

    batch: RaggedBatch
    ids: list[int]  # of each token of the row; 0 where it comes from a slot
    carried: list[tuple[int, int, int]]  # place in `order`, row index and the slot whose last token belongs there
    kept: list[int]  # row indices whose logits are computed
    order: list[int]  # rows of the plan, those that sample first
    slots: list[int]  # of each of these
    owners: list[int]  # of each token of the row, its place in `order`
    specs: list[SampleSpec]  # of those that sample
    histories: dict[int, Tensor]  # by index of the spec, where its rules look at earlier tokens
    prompts: list[_PromptRow]


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """A computed step, on the device. N rows sample, R rows in all, in the order of the inputs."""

    inputs: _Inputs
    tokens_N: Tensor
    sound_R: Tensor
    ruled_out_N: Tensor  # rows whose only fault is that their rules left no token
    sampled: Logprobs | None  # of the rows whose spec asks for them
    prompts: Logprobs | None  # of all prompt rows, one after another
    forced: Mapping[int, tuple[int, ...]]  # by row of the plan


class ModelRunner:
    """Implements ports.Runner over a loaded model and an arena. One thread uses it.

    `kv_layers`: K and V of each layer, [num_blocks, kv_heads, block_tokens, head_dim], in the model's dtype, zeroed at
    start (attention reads the unused tail of a block and gives it weight 0, which does not cancel a NaN).
    """

    def __init__(
        self,
        model: LoadedModel,
        kv_layers: Sequence[tuple[Tensor, Tensor]],
        *,
        block_tokens: int,
        max_slots: int,
        max_step_tokens: int,
        depth: int = 1,
    ) -> None:
        """`depth`: see ports.Runner; it changes who waits when, not what is computed."""
        wanted = (model.kv_heads, block_tokens, model.head_dim)
        if len(kv_layers) != model.layers:
            raise ValueError(f"the model keeps KV in {model.layers} layers, the arena has {len(kv_layers)}")
        for pair in kv_layers:
            for tensor in pair:
                if tuple(tensor.shape[1:]) != wanted or not tensor.is_contiguous():
                    raise ValueError(f"arena blocks of shape {tuple(tensor.shape[1:])} instead of contiguous {wanted}")
                if str(tensor.dtype) != f"torch.{model.dtype}":
                    raise ValueError(f"the arena holds {tensor.dtype}, the model computes in {model.dtype}")
        self.max_slots = max_slots
        self.max_step_tokens = max_step_tokens
        self.vocab_size = model.vocab_size
        self.depth = depth
        self.cost: StepCost | None = None
        self._model = model
        self._kv = dict(zip(model.layer_ids, kv_layers, strict=True))
        self._block_tokens = block_tokens
        self._log = TokenLog(model.device)
        self._last_tokens = torch.full((max_slots,), -1, dtype=torch.int64, device=model.device)
        self._outstanding: deque[tuple[StepPlan, _Outcome | DiptychError]] = deque()
        self._masker = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def launch(self, plan: StepPlan) -> None:
        """See ports.Runner. A plan that breaks the Protocol's rules is an AssertionError here, not a failed step."""
        assert len(self._outstanding) < MAX_OUTSTANDING, "two steps are outstanding already"
        assert 0 < plan.num_tokens <= self.max_step_tokens, f"a step of {plan.num_tokens} tokens"
        with torch.inference_mode():
            inputs = self._lay_out(plan)
            outcome: _Outcome | DiptychError
            try:
                outcome = self._compute(inputs)
            except DiptychError as exc:
                outcome = exc
            except Exception as exc:
                outcome = EngineFault("The model could not compute a step.", detail=f"step {plan.step_id}: {exc!r}")
                outcome.__cause__ = exc
            # Slots that did not sample, or not soundly, have nothing to go on from.
            last_R = torch.full((len(inputs.slots),), -1, dtype=torch.int64, device=self._model.device)
            if isinstance(outcome, _Outcome):
                num = len(inputs.specs)
                last_R[:num] = outcome.tokens_N.where(outcome.sound_R[:num], last_R[:num])
            self._last_tokens[torch.tensor(inputs.slots, device=self._model.device)] = last_R
            for index in inputs.histories:
                self._log.extend(inputs.slots[index], last_R[index].clamp(min=0))
        self._outstanding.append((plan, outcome))

    def collect(self) -> StepResult:
        """See ports.Runner. EngineFault: no row of the step has a token, and slots must not be continued from.

        Rows in `faults`: keys, values or logits that they computed are not finite; or their rules left no token, which
        alone is `ruled_out`; or the token to go on from was never sampled, because the row was in `faults` before.
        """
        assert self._outstanding, "no step is outstanding"
        plan, outcome = self._outstanding.popleft()
        if isinstance(outcome, DiptychError):
            raise outcome
        inputs = outcome.inputs
        faults = {row for row, sound in zip(inputs.order, outcome.sound_R.tolist(), strict=True) if not sound}
        prompts = _prompt_logprobs(outcome)
        broken = {row for row, told in prompts.items() if any(math.isnan(token.logprob) for token in told)}
        faults |= broken
        ruled_out = {row for row, is_it in zip(inputs.order, outcome.ruled_out_N.tolist(), strict=False) if is_it}
        tokens: list[int | None] = [None] * len(plan.rows)
        for row, token in zip(inputs.order, outcome.tokens_N.tolist(), strict=False):  # the first ones sampled
            tokens[row] = None if row in faults else token
        return StepResult(
            plan.step_id,
            tuple(tokens),
            logprobs={row: told for row, told in _sampled_logprobs(outcome).items() if row not in faults},
            prompt_logprobs={row: told for row, told in prompts.items() if row not in faults},
            faults=frozenset(faults),
            ruled_out=frozenset(ruled_out - broken),
            forced={row: tokens for row, tokens in outcome.forced.items() if row not in faults},
        )

    def max_runs(self, rows: int) -> int:
        """See ports.Runner: all of them. A CPU's step takes as long as its tokens."""
        return rows

    def idle(self) -> bool:
        """See ports.Runner: nothing."""
        return False

    def _lay_out(self, plan: StepPlan) -> _Inputs:
        segments: list[Segment] = []
        ids: list[int] = []
        for row in plan.rows:
            segments.append(Segment(len(ids), row.num_tokens, row.start, row.blocks))
            ids.extend(self._ids_of(row))
        sampling = [index for index, row in enumerate(plan.rows) if row.sample is not None]
        order = sampling + [index for index, row in enumerate(plan.rows) if row.sample is None]
        owners = [0] * len(ids)
        kept: list[int] = []
        carried: list[tuple[int, int, int]] = []
        specs: list[SampleSpec] = []
        histories: dict[int, Tensor] = {}
        for place, index in enumerate(order):
            row, first = plan.rows[index], segments[index].first
            owners[first : first + row.num_tokens] = [place] * row.num_tokens
            if row.tokens is None:
                carried.append((place, first, row.slot))
            if row.sample is not None:
                kept.append(first + row.num_tokens - 1)
                specs.append(row.sample)
                self._recall(row, row.sample, place, histories)
        prompts: list[_PromptRow] = []
        for index, row in enumerate(plan.rows):
            if row.prompt_logprobs is not None and row.tokens is not None:
                tokens = [*row.tokens[1:], *(() if row.next_token is None else (row.next_token,))]
                first, place = segments[index].first, len(kept)
                kept.extend(range(first, first + len(tokens)))
                prompts.append(_PromptRow(index, range(place, len(kept)), tokens, row.prompt_logprobs))
        batch = build_batch(segments, self._block_tokens, self._model.device)
        slots = [plan.rows[index].slot for index in order]
        return _Inputs(batch, ids, carried, kept, order, slots, owners, specs, histories, prompts)

    def _recall(self, row: StepRow, spec: SampleSpec, place: int, histories: dict[int, Tensor]) -> None:
        """The sequence's tokens, where its rules look at them."""
        if spec.rules is None or not spec.rules.needs_history:
            self._log.forget(row.slot)
            return
        if spec.history is not None:
            self._log.begin(row.slot, spec.history)
        known = self._log.length(row.slot)
        assert known == spec.position, f"slot {row.slot} samples position {spec.position}, its history has {known}"
        histories[place] = self._log.known(row.slot)

    def _compute(self, inputs: _Inputs) -> _Outcome:
        device = self._model.device
        ids_T = torch.tensor(inputs.ids, dtype=torch.int64, device=device)
        missing: tuple[Tensor, Tensor] | None = None
        if inputs.carried:
            places, firsts, slots = torch.tensor(inputs.carried, device=device).unbind(1)
            last = self._last_tokens[slots]
            ids_T[firsts] = last.clamp(min=0)
            missing = places, last < 0
        kept = torch.tensor(inputs.kept, dtype=torch.int64, device=device)
        masks = self._masker.submit(self._masks, inputs.specs) if any(spec.guide for spec in inputs.specs) else None
        logits_LV = self._model.forward(ids_T, inputs.batch, self._kv, kept)
        given = {} if masks is None else masks.result()
        chosen = sample(logits_LV[: len(inputs.specs)], inputs.specs, inputs.histories, given)
        sound_R = self._sound_kv(inputs)
        if missing is not None:
            sound_R[missing[0]] &= ~missing[1]
        ruled_out_N = chosen.ruled_out_N & sound_R[: len(inputs.specs)]
        sound_R[: len(inputs.specs)] &= chosen.sound_N
        asking = [index for index, spec in enumerate(inputs.specs) if spec.logprobs is not None]
        sampled = prompts = None
        if asking:
            rows = torch.tensor(asking, device=device)
            sampled = logprobs(logits_LV, rows, chosen.tokens_N[rows], max(_tops(inputs)))
        if inputs.prompts:
            rows = torch.tensor([i for p in inputs.prompts for i in p.places], dtype=torch.int64, device=device)
            tokens = torch.tensor([t for p in inputs.prompts for t in p.tokens], dtype=torch.int64, device=device)
            prompts = logprobs(logits_LV, rows, tokens, max(prompt.top for prompt in inputs.prompts))
        forced = _accept(inputs, chosen.tokens_N, sound_R) if masks is not None else {}
        return _Outcome(inputs, chosen.tokens_N, sound_R, ruled_out_N, sampled, prompts, forced)

    def _masks(self, specs: Sequence[SampleSpec]) -> dict[int, Tensor]:
        """What guides allow, while the step is computed."""
        guided = [(index, spec.guide, spec.position) for index, spec in enumerate(specs) if spec.guide is not None]
        # Empty: to set so much, torch would start a second team of OpenMP threads, for this thread alone.
        masks_MW = torch.empty(len(guided), mask_words(self.vocab_size), dtype=torch.int32)
        fill(masks_MW, [(guide, position) for _, guide, position in guided])
        return {index: mask_W for (index, _, _), mask_W in zip(guided, masks_MW.to(self._model.device), strict=True)}

    def _sound_kv(self, inputs: _Inputs) -> Tensor:
        """Which rows' tokens have finite keys and values in the last layer, where a NaN of any layer before arrives.

        Rows that do not sample have no other witness, and their KV is handed on and kept as a prefix for others.
        """
        batch = inputs.batch
        broken_T = torch.zeros(batch.num_tokens, dtype=torch.int64, device=self._model.device)
        for tensor in self._kv[self._model.layer_ids[-1]]:
            written_TKH = tensor[batch.blocks_T, :, batch.offsets_T]
            broken_T += ~torch.isfinite(written_TKH).flatten(1).all(dim=1)
        owners_T = torch.tensor(inputs.owners, dtype=torch.int64, device=self._model.device)
        return torch.zeros_like(broken_T[: len(inputs.order)]).index_add_(0, owners_T, broken_T) == 0

    def _ids_of(self, row: StepRow) -> Sequence[int]:
        assert 0 <= row.slot < self.max_slots, f"slot {row.slot}"
        assert row.start >= 0, f"start {row.start}"
        assert row.start + row.num_tokens <= self._model.max_context_tokens, "beyond the model's context"
        if row.tokens is None:
            assert row.num_tokens == 1, "only one token can come from the slot"
            assert row.prompt_logprobs is None, "a prompt's token cannot come from the slot"
            return (0,)
        assert len(row.tokens) == row.num_tokens, "num_tokens does not match tokens"
        return row.tokens


def _accept(inputs: _Inputs, tokens_N: Tensor, sound_R: Tensor) -> dict[int, tuple[int, ...]]:
    columns = zip(inputs.order, inputs.specs, tokens_N.tolist(), sound_R.tolist(), strict=False)
    return accept(
        (row, spec.guide, spec.position, token if is_sound else None)
        for row, spec, token, is_sound in columns
        if spec.guide is not None
    )


def _tops(inputs: _Inputs) -> list[int]:
    return [spec.logprobs for spec in inputs.specs if spec.logprobs is not None]


def _sampled_logprobs(outcome: _Outcome) -> dict[int, TokenLogprobs]:
    if outcome.sampled is None:
        return {}
    inputs = outcome.inputs
    asking = [row for row, spec in zip(inputs.order, inputs.specs, strict=False) if spec.logprobs is not None]
    return dict(zip(asking, outcome.sampled.rows(_tops(inputs)), strict=True))


def _prompt_logprobs(outcome: _Outcome) -> dict[int, tuple[TokenLogprobs, ...]]:
    if outcome.prompts is None:
        return {}
    prompts = outcome.inputs.prompts
    told = iter(outcome.prompts.rows([prompt.top for prompt in prompts for _ in prompt.tokens]))
    return {prompt.row: tuple(next(told) for _ in prompt.tokens) for prompt in prompts}
