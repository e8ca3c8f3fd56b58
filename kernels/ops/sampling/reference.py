"""Definition of sampling: one row of logits after another. V tokens of the vocabulary, N sampled rows.

Greedy (temperature 0): the largest logit, the lowest id among equals. Otherwise tokens weigh
exp((logit - max) / temperature). Order them by weight, equal ones by id; keep the first top_k (0: all); of these the
shortest prefix that has top_p of the mass (1: all). The token is where the cumulated weight, in order of ids, first
exceeds uniform(seed, position) * sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.protos.step import SampleSpec

from .philox import uniform


def sample(logits_NV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Token ids [N], int64, on the device of the logits."""
    tokens = [_sample_row(row, spec) for row, spec in zip(logits_NV.float(), specs, strict=True)]
    return torch.tensor(tokens, dtype=torch.int64, device=logits_NV.device)


def _sample_row(logits_V: Tensor, spec: SampleSpec) -> int:
    if spec.temperature == 0:
        return int((logits_V == logits_V.max()).nonzero()[0])
    weights_V = torch.exp((logits_V - logits_V.max()) / spec.temperature).double()
    if spec.top_k > 0 or spec.top_p < 1:
        weights_V = torch.where(kept_tokens(weights_V, spec), weights_V, 0.0)
    cumulated_V = weights_V.cumsum(0)
    threshold = uniform(spec.seed, spec.position) * float(cumulated_V[-1])
    beyond = (cumulated_V > threshold).nonzero()
    # Rounding can lift the product to the sum itself: then it is the last token that has any weight.
    return int(beyond[0]) if len(beyond) else int(weights_V.nonzero()[-1])


def kept_tokens(weights_V: Tensor, spec: SampleSpec) -> Tensor:
    """Boolean [V]: the tokens that top_k and top_p leave."""
    ordered, ids = torch.sort(weights_V, descending=True, stable=True)
    if spec.top_k > 0:
        ordered, ids = ordered[: spec.top_k], ids[: spec.top_k]
    if spec.top_p < 1:
        cumulated = ordered.cumsum(0)
        before = cumulated - ordered
        count = max(1, int((before < spec.top_p * float(cumulated[-1])).sum()))
        ids = ids[:count]
    return torch.zeros_like(weights_V, dtype=torch.bool).index_fill_(0, ids, True)
