"""Definition of sampling: one row of logits after another. V tokens of the vocabulary, N sampled rows.

Rules first (`apply_rules`). Greedy (temperature 0): the largest logit, the lowest id among equals. Otherwise tokens
weigh exp((logit - max) / temperature). Order them by weight, equal ones by id; keep the first top_k (0: all); of these
the shortest prefix that has top_p of the mass (1: all); of these the ones that weigh at least min_p times the heaviest
(0: all). The token is where the cumulated weight, in order of ids, first exceeds uniform(seed, position) * sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diptych.protos.step import SampleSpec

from .philox import uniform
from .sampled import Sampled


def sample(
    logits_NV: Tensor, specs: Sequence[SampleSpec], histories: Mapping[int, Tensor], masks: Mapping[int, Tensor]
) -> Sampled:
    """See launch.py. A row without a finite largest logit, before or after its rules, is not sound and gets no token.

    NaN counts as largest. A row that has one before its rules and none after them is `ruled_out`: say, every allowed
    token is a bad word.
    """
    tokens, sound, ruled_out = [], [], []
    for index, (row_V, spec) in enumerate(zip(logits_NV.float(), specs, strict=True)):
        ruled_V = apply_rules(row_V, spec, histories.get(index), masks.get(index))
        is_finite = bool(row_V.max().isfinite())
        sound.append(is_finite and bool(ruled_V.max().isfinite()))
        ruled_out.append(is_finite and not sound[-1])
        tokens.append(_choose(ruled_V, spec) if sound[-1] else 0)
    device = logits_NV.device
    return Sampled(
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.tensor(sound, dtype=torch.bool, device=device),
        torch.tensor(ruled_out, dtype=torch.bool, device=device),
    )


def apply_rules(logits_V: Tensor, spec: SampleSpec, history: Tensor | None, mask_W: Tensor | None = None) -> Tensor:
    """Float32 logits after the row's guide and rules, in this order; ids that the vocabulary lacks have no effect.

    mask: tokens whose bit is not set become -inf. allowed_token_ids: all others become -inf. logit_bias: added.
    bad_words: the last token of a word becomes -inf where the sequence ends in the tokens before it (an empty word
    forbids nothing). min_tokens: stop_token_ids become -inf for the first min_tokens generated tokens.
    repetition_penalty: logits of tokens in the sequence, prompt included, are divided by it if positive, else
    multiplied. frequency_penalty times the count in the generated part is subtracted, then presence_penalty where that
    count is not 0.
    """
    rules = spec.rules
    if mask_W is not None:
        logits_V = torch.where(bits_of(mask_W, len(logits_V)), logits_V, -torch.inf)
    if rules is None:
        return logits_V
    logits_V, vocab = logits_V.clone(), len(logits_V)
    if rules.allowed_token_ids is not None:
        allowed_V = torch.zeros_like(logits_V, dtype=torch.bool)
        allowed_V[[token for token in rules.allowed_token_ids if 0 <= token < vocab]] = True
        logits_V[~allowed_V] = -torch.inf
    for token, bias in rules.logit_bias:
        if 0 <= token < vocab:
            logits_V[token] += bias
    known = [] if history is None else history.tolist()
    forbidden = [word[-1] for word in rules.bad_words if word and ends_in(known, word[:-1])]
    if spec.position - rules.num_prompt < rules.min_tokens:
        forbidden.extend(rules.stop_token_ids)
    logits_V[[token for token in forbidden if 0 <= token < vocab]] = -torch.inf
    if history is not None:
        seen_V = torch.bincount(history, minlength=vocab) > 0
        penalised_V = torch.where(
            logits_V > 0, logits_V / rules.repetition_penalty, logits_V * rules.repetition_penalty
        )
        logits_V = torch.where(seen_V, penalised_V, logits_V)
        counts_V = torch.bincount(history[rules.num_prompt :], minlength=vocab).float()
        logits_V = logits_V - rules.frequency_penalty * counts_V - rules.presence_penalty * (counts_V > 0)
    return logits_V


def bits_of(mask_W: Tensor, vocab: int) -> Tensor:
    """Boolean [V] of a guide's mask, int32 words."""
    shifts = torch.arange(32, dtype=torch.int32, device=mask_W.device)
    return ((mask_W[:, None] >> shifts) & 1).bool().flatten()[:vocab]


def ends_in(known: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether the sequence's last tokens are these."""
    return len(tokens) <= len(known) and list(known[len(known) - len(tokens) :]) == list(tokens)


def _choose(logits_V: Tensor, spec: SampleSpec) -> int:
    if spec.temperature == 0:
        return int((logits_V == logits_V.max()).nonzero()[0])
    weights_V = torch.exp((logits_V - logits_V.max()) / spec.temperature).double()
    if spec.top_k > 0 or spec.top_p < 1 or spec.min_p > 0:
        weights_V = torch.where(kept_tokens(weights_V, spec), weights_V, 0.0)
    cumulated_V = weights_V.cumsum(0)
    threshold = uniform(spec.seed, spec.position) * float(cumulated_V[-1])
    beyond = (cumulated_V > threshold).nonzero()
    # Rounding can lift the product to the sum itself: then it is the last token that has any weight.
    return int(beyond[0]) if len(beyond) else int(weights_V.nonzero()[-1])


def kept_tokens(weights_V: Tensor, spec: SampleSpec) -> Tensor:
    """Boolean [V]: the tokens that top_k, top_p and min_p leave."""
    ordered, ids = torch.sort(weights_V, descending=True, stable=True)
    if spec.top_k > 0:
        ordered, ids = ordered[: spec.top_k], ids[: spec.top_k]
    if spec.top_p < 1:
        cumulated = ordered.cumsum(0)
        before = cumulated - ordered
        count = max(1, int((before < spec.top_p * float(cumulated[-1])).sum()))
        ordered, ids = ordered[:count], ids[:count]
    ids = ids[ordered >= spec.min_p * float(ordered[0])]
    return torch.zeros_like(weights_V, dtype=torch.bool).index_fill_(0, ids, True)
