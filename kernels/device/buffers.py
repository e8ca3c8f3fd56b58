"""The static memory of a step: what graphs were captured over must stay where it is, whatever the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .state import DeviceState
from .step import StepTensors

if TYPE_CHECKING:
    from ..ops.paged_attention.split import Splits
    from .graphs import StepShape
    from .wire import Layout


class StepBuffers:
    """Tensors of steps of up to `max_rows` rows and `max_tokens` tokens, and of their outcome. V: vocabulary."""

    def __init__(
        self,
        state: DeviceState,
        splits: Splits | None,
        *,
        max_rows: int,
        max_tokens: int,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        device = state.words.device

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._state = state
        self._splits = splits
        self._ids, self._positions, self._row_of = ints(max_tokens), ints(max_tokens), ints(max_tokens)
        self._slot_mapping = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._query_start, self._seq_len = ints(max_rows + 1), ints(max_rows)
        self._slots, self._flags = ints(max_rows), ints(max_rows)
        self._kept = torch.zeros(max_rows + max_tokens, dtype=torch.int64, device=device)
        self._every = torch.arange(max_rows, device=device)
        self._shaped: dict[StepShape, StepTensors] = {}
        self._logits_RV = torch.zeros(max_rows, vocab_size, dtype=dtype, device=device)
        self.tokens_R = torch.zeros(max_rows, dtype=torch.int64, device=device)  # by place in the logits
        self.token_flags_R = ints(max_rows)
        self.out_R2 = ints(max_rows, 2)  # see ops/step_inputs

    def shaped_step(self, shape: StepShape) -> StepTensors:
        """A step whose logits are wanted after the last token of each row."""
        if shape not in self._shaped:
            singles, prompts, tokens = shape
            kept_N = self._kept[: shape.rows] if prompts else self._every[:singles]
            self._shaped[shape] = self._step(tokens, singles, prompts, tokens - singles if prompts else 0, kept_N)
        return self._shaped[shape]

    def mixed_step(self, layout: Layout) -> StepTensors:
        """Any other step."""
        rest = layout.num_rows - layout.singles
        kept_N = self._kept[: len(layout.kept)]
        return self._step(layout.num_tokens, layout.singles, rest, layout.most_prompt, kept_N)

    def logits(self, count: int) -> Tensor:
        """Room for so many rows of logits; more than there are rows are asked for with prompt logprobs alone."""
        if count <= len(self._logits_RV):
            return self._logits_RV[:count]
        return self._logits_RV.new_empty(count, self._logits_RV.shape[1])

    def _step(self, tokens: int, singles: int, prompts: int, most_prompt: int, kept_N: Tensor) -> StepTensors:
        rows = singles + prompts
        return StepTensors(
            ids_T=self._ids[:tokens],
            positions_T=self._positions[:tokens],
            slot_mapping_T=self._slot_mapping[:tokens],
            row_T=self._row_of[:tokens],
            query_start_R=self._query_start[: rows + 1],
            seq_len_R=self._seq_len[:rows],
            slot_R=self._slots[:rows],
            blocks_SB=self._state.blocks_SB,
            kept_N=kept_N,
            flags_R=self._flags[:rows],
            splits=self._splits,
            num_tokens=tokens,
            decode_rows=singles,
            prompt_rows=prompts,
            most_prompt=most_prompt,
            block_tokens=self._state.block_tokens,
        )
