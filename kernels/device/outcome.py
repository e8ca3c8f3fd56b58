"""What a step left on the host, made into the result that its workers read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diptych.protos.step import StepPlan, StepResult
from diptych.protos.types import TokenLogprobs

from ..ops.logprobs.columns import Logprobs
from .step import RULED_OUT
from .wire import Layout


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A launched step. The tensors are the host's, and hold what the device says once the step's event has passed."""

    plan: StepPlan
    layout: Layout
    turn: int  # which of the outstanding steps' memory it uses
    out_R2: Tensor  # int32: token or -1, and flags, of each row of the layout up to the plan's last
    sampled: Logprobs | None  # of the rows that sample and ask for them
    prompts: Logprobs | None  # of all prompt rows, one after another

    def result(self) -> StepResult:
        """After the event. Rows whose prompt's logprobs are not finite are faults, too."""
        layout = self.layout
        tokens: list[int | None] = [None] * layout.num_rows
        faults: set[int] = set()
        ruled_out: set[int] = set()
        told: list[list[int]] = self.out_R2.tolist()
        del told[layout.singles : layout.singles + layout.gap]
        for row, (token, flags) in zip(layout.order, told, strict=True):
            if flags:
                faults.add(row)
                if flags == RULED_OUT:
                    ruled_out.add(row)
            elif token >= 0:
                tokens[row] = token
        if self.sampled is None and self.prompts is None:
            return StepResult(
                self.plan.step_id, tuple(tokens), faults=frozenset(faults), ruled_out=frozenset(ruled_out)
            )
        prompts = self._prompt_logprobs()
        broken = {row for row, told in prompts.items() if any(math.isnan(token.logprob) for token in told)}
        faults |= broken
        return StepResult(
            self.plan.step_id,
            tuple(None if row in broken else token for row, token in enumerate(tokens)),
            logprobs={row: told for row, told in self._sampled_logprobs().items() if row not in faults},
            prompt_logprobs={row: told for row, told in prompts.items() if row not in faults},
            faults=frozenset(faults),
            ruled_out=frozenset(ruled_out - broken),
        )

    def _sampled_logprobs(self) -> dict[int, TokenLogprobs]:
        if self.sampled is None:
            return {}
        telling = self.layout.telling
        told = self.sampled.rows([one.spec.logprobs or 0 for one in telling])
        return {row.row: one for row, one in zip(telling, told, strict=True)}

    def _prompt_logprobs(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        if self.prompts is None:
            return {}
        prompts = self.layout.prompts
        told = iter(self.prompts.rows([prompt.top for prompt in prompts for _ in prompt.tokens]))
        return {prompt.row: tuple(next(told) for _ in prompt.tokens) for prompt in prompts}
