"""How the echo model chooses: it is as sure of its favourite as of all other tokens together, and so on down its list.

rank 0: the favourite; rank r: the r-th word after it, ids wrapping around; then bytes and marks. When END is due it
has rank 0 and the others move up by one. A token of rank r has probability 2**-(r+1), and no less than 2**-64. Rules,
filters and their order are those of ops/sampling/reference.py, but a draw goes down the list instead of up the ids, and
at most RANKS tokens that no rule names are drawn from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diptych.protos.echo import END, NUM_WORDS, STOP, VOCAB_SIZE
from diptych.protos.step import LogitRules, SampleSpec
from diptych.protos.types import TokenLogprobs

from ..ops.sampling.philox import uniform
from .form import Allowed, is_free, shortest

RANKS = 64
_LN2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Guess:
    """What may come next. `first`: a token that comes before the favourite, if any."""

    favourite: int
    first: int | None = None

    def rank(self, token: int) -> int:
        """0 for the most likely token."""
        if token == self.first:
            return 0
        rank = (token - self.favourite) % NUM_WORDS if token < NUM_WORDS else token
        return rank + (self.first is not None)

    def token(self, rank: int) -> int:
        """The token of a rank below NUM_WORDS."""
        if self.first is not None:
            if rank == 0:
                return self.first
            rank -= 1
        return (self.favourite + rank) % NUM_WORDS

    def logit(self, token: int) -> float:
        """The natural logarithm of its probability."""
        return -_LN2 * min(self.rank(token) + 1, RANKS)

    def told(self, token: int, top: int) -> TokenLogprobs:
        """The logprobs of a token, with the `top` most likely ones."""
        best = tuple((self.token(rank), self.logit(self.token(rank))) for rank in range(top))
        return TokenLogprobs(self.logit(token), self.rank(token) + 1, best)


def first_of(known: Sequence[int]) -> int | None:
    """END where it is due after these tokens: the last STOP that a word tN follows is N + 2 positions back, or more."""
    for at in range(len(known) - 2, -1, -1):
        if known[at] == STOP:
            count = known[at + 1] if known[at + 1] < NUM_WORDS else 0
            return END if len(known) >= at + 2 + count else None
    return None


def choose(guess: Guess, spec: SampleSpec, known: Sequence[int], allowed: Allowed | None = None) -> int | None:
    """The token that `spec` samples after the tokens `known`, of those that its guide allows; None when its rules leave
    none.
    """
    if allowed is not None:
        barred = _barred(spec, known)
        if barred is not None:
            allowed = allowed & ~barred
        free = choose(guess, spec, known) if is_free(allowed) else None
        return free if free is not None and allowed[free] else shortest(allowed, known)
    if spec.rules is None:
        if spec.temperature == 0:
            return guess.token(0)
        ordered = [(guess.logit(token), token) for token in map(guess.token, range(RANKS))]
    else:
        ordered = _ruled(guess, spec, spec.rules, known)
        if not ordered:
            return None
        if spec.temperature == 0:
            return ordered[0][1]
    return _draw(ordered, spec)


def _ruled(guess: Guess, spec: SampleSpec, rules: LogitRules, known: Sequence[int]) -> list[tuple[float, int]]:
    """(logit, token) after the rules, the largest first, lower ids first among equals."""
    forbidden = _forbidden(spec, rules, known)
    bias: dict[int, float] = {}
    for token, value in rules.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    seen = set(known) if rules.needs_history else set()
    counts = Counter(known[rules.num_prompt :]) if rules.needs_history else Counter[int]()
    if rules.allowed_token_ids is not None:
        possible = set(rules.allowed_token_ids)
    else:
        named = forbidden | bias.keys() | seen
        possible = named | {guess.token(rank) for rank in range(RANKS + len(named))}
    found = []
    for token in possible - forbidden:
        if not 0 <= token < VOCAB_SIZE:
            continue
        logit = guess.logit(token) + bias.get(token, 0.0)
        if token in seen:
            logit = logit / rules.repetition_penalty if logit > 0 else logit * rules.repetition_penalty
        if counts[token]:
            logit -= rules.frequency_penalty * counts[token] + rules.presence_penalty
        if logit != -math.inf:
            found.append((logit, token))
    return sorted(found, key=lambda item: (-item[0], item[1]))


def _forbidden(spec: SampleSpec, rules: LogitRules, known: Sequence[int]) -> set[int]:
    forbidden = {word[-1] for word in rules.bad_words if word and _ends_in(known, word[:-1])}
    if spec.position - rules.num_prompt < rules.min_tokens:
        forbidden.update(rules.stop_token_ids)
    return forbidden


def _barred(spec: SampleSpec, known: Sequence[int]) -> Allowed | None:
    """What rules exclude outright."""
    if spec.rules is None:
        return None
    barred = np.zeros(VOCAB_SIZE, bool)
    if spec.rules.allowed_token_ids is not None:
        barred[:] = True
        barred[[token for token in spec.rules.allowed_token_ids if 0 <= token < VOCAB_SIZE]] = False
    barred[[token for token in _forbidden(spec, spec.rules, known) if 0 <= token < VOCAB_SIZE]] = True
    return barred


def _draw(ordered: Sequence[tuple[float, int]], spec: SampleSpec) -> int:
    weights = [math.exp((logit - ordered[0][0]) / spec.temperature) for logit, _ in ordered]
    if spec.top_k > 0:
        weights = weights[: spec.top_k]
    if spec.top_p < 1:
        room, kept = spec.top_p * math.fsum(weights), 0.0
        count = 0
        while count < len(weights) and (count == 0 or kept < room):
            kept += weights[count]
            count += 1
        weights = weights[:count]
    weights = [weight for weight in weights if weight >= spec.min_p]  # the heaviest weighs 1
    threshold = uniform(spec.seed, spec.position) * math.fsum(weights)
    reached = 0.0
    for weight, (_, token) in zip(weights, ordered, strict=False):
        reached += weight
        if reached > threshold:
            return token
    return ordered[len(weights) - 1][1]


def _ends_in(known: Sequence[int], tokens: Sequence[int]) -> bool:
    return len(tokens) <= len(known) and tuple(known[len(known) - len(tokens) :]) == tuple(tokens)
