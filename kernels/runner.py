"""The runner: a step's plan in, one token per sampled row out. Called by the workers through the Protocol in ports.

The last token sampled for a slot stays here, so that the next step can be launched before the host has read this one.
On a CPU `launch` computes the step; its error, if any, is kept for `collect`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.protos.errors import DiptychError, EngineFault
from diptych.protos.step import SampleSpec, StepPlan, StepResult, StepRow

from .model import LoadedModel
from .ops.ragged import RaggedBatch, Segment, build_batch
from .ops.sampling.launch import sample

MAX_OUTSTANDING = 2


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A plan, checked and laid out as one row."""

    batch: RaggedBatch
    ids: list[int]  # of each token of the row; 0 where it comes from a slot
    carried: list[tuple[int, int]]  # row index and the slot whose last token belongs there
    sampled: list[int]  # row indices to sample after
    specs: list[SampleSpec]  # of each of these
    slots: list[int]  # of each of these


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
    ) -> None:
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
        self._model = model
        self._kv = dict(zip(model.layer_ids, kv_layers, strict=True))
        self._num_blocks = kv_layers[0][0].shape[0]
        self._block_tokens = block_tokens
        self._last_tokens = torch.full((max_slots,), -1, dtype=torch.int64, device=model.device)
        self._outstanding: deque[tuple[StepPlan, Tensor | DiptychError]] = deque()

    def launch(self, plan: StepPlan) -> None:
        """See ports.Runner. A plan that breaks the Protocol's rules is an AssertionError here, not a failed step."""
        assert len(self._outstanding) < MAX_OUTSTANDING, "two steps are outstanding already"
        assert 0 < plan.num_tokens <= self.max_step_tokens, f"a step of {plan.num_tokens} tokens"
        with torch.inference_mode():
            inputs = self._lay_out(plan)
            outcome: Tensor | DiptychError
            try:
                outcome = self._compute(plan.step_id, inputs)
            except DiptychError as exc:
                outcome = exc
            except Exception as exc:
                outcome = EngineFault("The model could not compute a step.", detail=f"step {plan.step_id}: {exc!r}")
                outcome.__cause__ = exc
            if isinstance(outcome, DiptychError):
                self._last_tokens[[row.slot for row in plan.rows]] = -1
        self._outstanding.append((plan, outcome))

    def collect(self) -> StepResult:
        """See ports.Runner. EngineFault: no row of the step has a token, and slots must not be continued from."""
        assert self._outstanding, "no step is outstanding"
        plan, outcome = self._outstanding.popleft()
        if isinstance(outcome, DiptychError):
            raise outcome
        tokens = iter(outcome.tolist())
        return StepResult(plan.step_id, tuple(next(tokens) if row.sample is not None else None for row in plan.rows))

    def _lay_out(self, plan: StepPlan) -> _Inputs:
        segments: list[Segment] = []
        ids: list[int] = []
        carried: list[tuple[int, int]] = []
        sampled: list[int] = []
        specs: list[SampleSpec] = []
        slots: list[int] = []
        for row in plan.rows:
            first = len(ids)
            segments.append(Segment(first, row.num_tokens, row.start, row.blocks))
            ids.extend(self._ids_of(row))
            if row.tokens is None:
                carried.append((first, row.slot))
            if row.sample is not None:
                sampled.append(len(ids) - 1)
                specs.append(row.sample)
                slots.append(row.slot)
        batch = build_batch(segments, self._block_tokens, self._model.device)
        return _Inputs(batch, ids, carried, sampled, specs, slots)

    def _compute(self, step_id: int, inputs: _Inputs) -> Tensor:
        device = self._model.device
        ids_T = torch.tensor(inputs.ids, dtype=torch.int64, device=device)
        if inputs.carried:
            places, sources = torch.tensor(inputs.carried, device=device).unbind(1)
            last = self._last_tokens[sources]
            if device.type == "cpu" and bool((last < 0).any()):
                raise EngineFault("A sequence was continued that has no sampled token.", detail=f"step {step_id}")
            ids_T[places] = last
        sampled_N = torch.tensor(inputs.sampled, dtype=torch.int64, device=device)
        logits_NV = self._model.forward(ids_T, inputs.batch, self._kv, sampled_N)
        if not inputs.slots:
            return sampled_N
        # A NaN anywhere in a row is its maximum too.
        broken = ~torch.isfinite(logits_NV.amax(dim=-1))
        if bool(broken.any()):
            bad = [inputs.slots[index] for index in broken.nonzero()[:, 0].tolist()]
            raise EngineFault("The model computed numbers that are not finite.", detail=f"step {step_id}, slots {bad}")
        tokens_N = sample(logits_NV, inputs.specs)
        self._last_tokens[torch.tensor(inputs.slots, device=device)] = tokens_N
        return tokens_N

    def _ids_of(self, row: StepRow) -> Sequence[int]:
        assert 0 <= row.slot < self.max_slots, f"slot {row.slot}"
        assert row.start >= 0, f"start {row.start}"
        assert row.start + row.num_tokens <= self._model.max_context_tokens, "beyond the model's context"
        if row.tokens is None:
            assert row.num_tokens == 1, "only one token can come from the slot"
            return (0,)
        assert len(row.tokens) == row.num_tokens, "num_tokens does not match tokens"
        return row.tokens
