"""Entry of sampling: checks shapes, chooses by device type. N sampled rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diptych.protos.step import SampleSpec

from ..table import implementation


def sample(logits_NV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """One token id per row, [N] int64 on the device. Logits must not be NaN. Rows do not affect each other."""
    if logits_NV.dim() != 2 or logits_NV.shape[0] != len(specs):
        raise ValueError(f"sample: logits {tuple(logits_NV.shape)} for {len(specs)} specs")
    return implementation("sampling", logits_NV.device.type).sample(logits_NV, specs)  # type: ignore[no-any-return]
