"""Entry of sampling: checks shapes, chooses by device type. N sampled rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diptych.protos.step import SampleSpec

from ..table import implementation
from .sampled import Sampled


def sample(logits_NV: Tensor, specs: Sequence[SampleSpec], histories: Mapping[int, Tensor] | None = None) -> Sampled:
    """One token per row, after its spec. Rows do not affect each other, and the logits stay as they are.

    `histories`: by row, the sequence's ids so far, int64 of length spec.position, on the device; where rules need them.
    """
    histories = histories or {}
    if logits_NV.dim() != 2 or logits_NV.shape[0] != len(specs):
        raise ValueError(f"sample: logits {tuple(logits_NV.shape)} for {len(specs)} specs")
    for row, spec in enumerate(specs):
        if spec.rules is None or not spec.rules.needs_history:
            continue
        known = len(histories[row]) if row in histories else 0
        if known != spec.position:
            raise ValueError(f"sample: row {row} needs the {spec.position} tokens before it and has {known}")
    return implementation("sampling", logits_NV.device.type).sample(logits_NV, specs, histories)  # type: ignore[no-any-return]
