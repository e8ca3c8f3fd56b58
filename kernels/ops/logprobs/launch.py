"""Entry of logprobs: checks shapes, chooses by device type. N rows of logits, R rows asked for, V vocabulary."""

from __future__ import annotations

from torch import Tensor

from ..table import implementation
from .columns import Logprobs


def logprobs(logits_NV: Tensor, rows_R: Tensor, tokens_R: Tensor, most: int) -> Logprobs:
    """Of tokens_R[r] under the logits in row rows_R[r], with `most` alternatives (all, where there are fewer)."""
    if logits_NV.dim() != 2 or rows_R.shape != tokens_R.shape or rows_R.dim() != 1 or most < 0:
        shapes = f"{tuple(rows_R.shape)} rows and {tuple(tokens_R.shape)} tokens"
        raise ValueError(f"logprobs: logits {tuple(logits_NV.shape)}, {shapes}, {most} alternatives")
    return implementation("logprobs", logits_NV.device.type).logprobs(logits_NV, rows_R, tokens_R, most)  # type: ignore[no-any-return]
