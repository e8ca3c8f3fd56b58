"""What tests and measurements of choosing on a device share: a step of rows of one token, whose specs and histories lie
in a state as a runner would have put them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diptych.protos.step import SampleSpec, StepPlan, StepRow

from ...device.masks import MaskBuffers
from ...device.state import DeviceState
from ...device.wire import Packer, Wire, wire_words
from ..step_inputs.launch import apply_updates
from .space import Asking, SampleSpace, Tiling


class AskedStep:
    """One row for each spec; `histories` are the sequences' tokens, of length spec.position. Every slot is its row's
    number, every row of logits, too.
    """

    def __init__(
        self,
        specs: Sequence[SampleSpec],
        histories: Sequence[Sequence[int]],
        *,
        vocab: int,
        device: torch.device,
        tiling: Tiling | None = None,
    ) -> None:
        num, longest = len(specs), max(spec.position for spec in specs)
        context = max(longest, 1)
        self.state = DeviceState(
            max_slots=num,
            max_context_tokens=context,
            block_tokens=context,
            spare_block=0,
            device=device,
            vocab_size=vocab,
        )
        rows = []
        for slot, (spec, history) in enumerate(zip(specs, histories, strict=True)):
            is_known = spec.rules is not None and spec.rules.needs_history
            spec = replace(spec, history=tuple(history) if is_known else None)
            start = spec.position - 1
            rows.append(
                StepRow(slot=slot, num_tokens=1, tokens=(history[-1],), start=start, blocks=[slot], sample=spec)
            )
        layout = Packer(self.state).lay_out(StepPlan(0, tuple(rows)))
        count = layout.updates.count
        memory = torch.zeros(wire_words(max_rows=num, max_step_tokens=num) + 2 * count, dtype=torch.int32)
        words, tail, _ = Wire(memory.numpy()).fill(layout)
        wire_W = memory.to(device)
        apply_updates(wire_W, self.state, count)
        begin = words - sum(map(len, tail))
        middle = begin + len(tail.asked)
        asked, masked = wire_W[begin:middle], wire_W[middle : middle + len(tail.asked)]
        masks = MaskBuffers(turns=1, max_rows=num, vocab=vocab, device=device)
        self.asking = Asking(layout.asking, wire_W, asked, masked, masks.put(0, layout.guided))
        self.space = SampleSpace(max_rows=num, vocab=vocab, device=device, tiling=tiling)
        self.tokens_N = torch.full((num,), -7, dtype=torch.int64, device=device)
        self.flags_N = torch.full((num,), -7, dtype=torch.int32, device=device)

    def choose(self, how: object, logits_NV: Tensor) -> tuple[list[int], list[int]]:
        """Tokens and flags by an implementation's two calls."""
        how.choose_largest(logits_NV, self.space, self.tokens_N, self.flags_N)  # type: ignore[attr-defined]
        how.choose_as_asked(  # type: ignore[attr-defined]
            logits_NV, self.asking, self.state, self.space, self.tokens_N, self.flags_N
        )
        return self.tokens_N.tolist(), self.flags_N.tolist()
