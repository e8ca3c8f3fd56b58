"""Sampling on a CPU: greedy rows together, the others without sorting the vocabulary. N sampled rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.protos.step import SampleSpec

from .philox import uniform

# Tokens looked at first for top_p; widened eightfold while they do not hold the mass. At 49,152 tokens topk(256) takes
# a tenth of a full sort's time.
FIRST_CANDIDATES = 256


def sample(logits_NV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """See reference.py."""
    tokens_N = logits_NV.argmax(dim=-1)
    for row, spec in enumerate(specs):
        if spec.temperature != 0:
            tokens_N[row] = _sample_row(logits_NV[row].float(), spec)
    return tokens_N


def _sample_row(logits_V: Tensor, spec: SampleSpec) -> int:
    weights_V = torch.exp((logits_V - logits_V.max()) / spec.temperature).double()
    number = uniform(spec.seed, spec.position)
    if spec.top_k <= 0 and spec.top_p >= 1:
        return _invert(weights_V, number)
    ids = _kept_ids(weights_V, spec)
    return int(ids[_invert(weights_V[ids], number)])


def _invert(weights: Tensor, number: float) -> int:
    cumulated = weights.cumsum(0)
    index = int(torch.searchsorted(cumulated, number * cumulated[-1], right=True))
    return index if index < len(weights) else int(weights.nonzero()[-1])


def _kept_ids(weights_V: Tensor, spec: SampleSpec) -> Tensor:
    """The ids that top_k and top_p leave, ascending."""
    vocab = len(weights_V)
    limit = min(spec.top_k, vocab) if spec.top_k > 0 else vocab
    if spec.top_p >= 1:
        return _largest(weights_V, weights_V.topk(limit).values, limit)
    # With top_k the mass is that of the k largest; they are few, or all are taken at once.
    width = limit if spec.top_k > 0 else min(FIRST_CANDIDATES, vocab)
    total = None if spec.top_k > 0 else float(weights_V.sum())
    while True:
        ordered = weights_V.topk(width).values
        cumulated = ordered.cumsum(0)
        if width == limit:
            total = float(cumulated[-1])
        assert total is not None
        if width == limit or float(cumulated[-1]) >= spec.top_p * total:
            count = max(1, int((cumulated - ordered < spec.top_p * total).sum()))
            return _largest(weights_V, ordered, count)
        width = min(width * 8, limit)


def _largest(weights_V: Tensor, ordered: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest, ascending; of equal ones the lower. `ordered`: the largest values, descending."""
    pivot = ordered[count - 1]
    ids = (weights_V >= pivot).nonzero()[:, 0]
    surplus = len(ids) - count
    if surplus:
        equal = (weights_V[ids] == pivot).nonzero()[:, 0]
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[equal[len(equal) - surplus :]] = False
        ids = ids[keep]
    return ids
