"""A checked body and a model's own defaults to SamplingParams: seeds, end tokens, what only a vocabulary can tell."""

from __future__ import annotations

import os
from collections.abc import Iterable, Set
from dataclasses import replace

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import GenerationRequest
from diptych.protos.openai_sampling import seed_of_choice
from diptych.protos.strict_json import printable
from diptych.protos.types import SamplingParams

from .served import ServedModel


async def sampling_of(
    request: GenerationRequest,
    model: ServedModel,
    prompt: tuple[int, ...],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """How `request` wants the tokens after `prompt` chosen. Raises InvalidRequest naming the field.

    A field is the request's, else the model's generation_config.json's, else OpenAI's default.
    """
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        given: tuple[int | tuple[int, float], ...] = getattr(request, name) or ()
        check_token_ids((entry[0] if isinstance(entry, tuple) else entry for entry in given), model.vocab_size, name)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens}, more than the {max_tokens} that max_tokens allows", "min_tokens"
        )
    stops = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else model.eos_token_ids)
    bad_words = await model.renderer.bad_words(request.bad_words) if request.bad_words else ()
    barred = {
        "bad_words": {word[-1] for word in bad_words if prompt[len(prompt) - len(word) + 1 :] == word[:-1]},
        "min_tokens": stops if min_tokens else frozenset(),
    }
    _check_possible(request.allowed_token_ids, model.vocab_size, barred)
    own = model.defaults
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_first(request.temperature, own.temperature, 1.0),
        top_p=_first(request.top_p, own.top_p, 1.0),
        top_k=int(_first(request.top_k, own.top_k, 0)),
        min_p=_first(request.min_p, own.min_p, 0.0),
        seed=_seed(request.seed, model.seed),
        stop_token_ids=stops,
        min_tokens=min_tokens,
        repetition_penalty=_first(request.repetition_penalty, own.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias,
        bad_words=bad_words,
        allowed_token_ids=request.allowed_token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def of_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """The same for choice `index` of several: a seed of its own, and the prompt's logprobs are told once, with 0."""
    if index == 0:
        return sampling
    return replace(sampling, seed=seed_of_choice(sampling.seed, index), prompt_logprobs=None)


def check_token_ids(tokens: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest when an id is outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            wrong = printable(str(token), 24)
            raise InvalidRequest(
                f"{param} holds the token id {wrong}; this model's ids go from 0 to {vocab_size - 1}", param
            )


def _first(wanted: float | None, own: float | None, default: float) -> float:
    return next(value for value in (wanted, own, default) if value is not None)


def _seed(wanted: int | None, default: int | None) -> int:
    seed = default if wanted is None else wanted
    return int.from_bytes(os.urandom(8)) if seed is None else seed & 0xFFFF_FFFF_FFFF_FFFF


def _check_possible(allowed: tuple[int, ...] | None, vocab_size: int, barred: dict[str, Set[int]]) -> None:
    """Refuse what would leave no first token; `barred`: by field, the tokens that must not come first."""
    candidates = range(vocab_size) if allowed is None else allowed
    every = frozenset[int]().union(*barred.values())
    if len(every) < len(candidates) or not every.issuperset(candidates):
        return
    names = [] if allowed is None else ["allowed_token_ids"]
    names += [name for name, tokens in barred.items() if not tokens.isdisjoint(candidates)]
    verb = "exclude" if len(names) > 1 else "excludes"
    raise InvalidRequest(f"no token is left by the rules: {' and '.join(names)} {verb} every one", names[0])
