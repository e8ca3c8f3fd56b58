"""What the echo model answers, in plain integers and without an engine: what tests and storms compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diptych.protos.lifecycle import logit_rules
from diptych.protos.step import SampleSpec
from diptych.protos.types import SamplingParams, TokenLogprobs

from .choice import Guess, choose, first_of
from .hashing import MASK, ROOT, favourite, share

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True, slots=True)
class ExpectedToken:
    """A token, and how sure the model is of it."""

    token: int
    guess: Guess

    def logprobs(self, top: int) -> TokenLogprobs:
        """What the engine tells of it, with `top` alternatives."""
        return self.guess.told(self.token, top)


def expected_tokens(
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    generated: Sequence[int] = (),
) -> list[int]:
    """The tokens of one undisturbed answer that follow `generated`, the token that ends it included.

    `max_tokens` counts the whole answer, `generated` included; the one in `sampling` is not read. An answer that was
    moved to another engine goes on in the same way: it depends on prompt and generated tokens only. Raises ValueError
    when the rules of `sampling` leave no token.
    """
    return [at.token for at in expected(prompt, max_tokens, sampling, generated=generated)]


def expected(
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    generated: Sequence[int] = (),
) -> list[ExpectedToken]:
    """`expected_tokens`, with what their logprobs come from."""
    known = [*prompt, *generated]
    rules = logit_rules(sampling, len(prompt))
    state = state_after(known)
    found: list[ExpectedToken] = []
    while len(generated) + len(found) < max_tokens:
        guess = Guess(favourite(state), first_of(known))
        spec = SampleSpec(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            position=len(known),
            rules=rules,
        )
        token = choose(guess, spec, known)
        if token is None:
            raise ValueError(f"the rules leave no token for position {len(known)}")
        found.append(ExpectedToken(token, guess))
        if token in sampling.stop_token_ids:
            break
        state = state + share(token, len(known)) & MASK
        known.append(token)
    return found


def expected_prompt_logprobs(prompt: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Of the prompt's tokens but the first."""
    told = []
    for at in range(1, len(prompt)):
        known = prompt[:at]
        told.append(Guess(favourite(state_after(known)), first_of(known)).told(prompt[at], top))
    return told


def state_after(tokens: Sequence[int]) -> int:
    """The state that the KV of the last of these tokens holds."""
    return ROOT + sum(share(token, at) for at, token in enumerate(tokens)) & MASK
