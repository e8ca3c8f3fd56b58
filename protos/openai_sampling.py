"""The sampling fields that both OpenAI endpoints share: OpenAI's own and the extensions that vLLM's clients send.

What can be checked without a model is checked here; vocabulary, context and defaults: cluster/api/sampling.py.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from .errors import InvalidRequest
from .strict_json import printable

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASED = 1024
MAX_BAD_WORDS = 128
MAX_STOP_TOKENS = 128
MAX_ALLOWED_TOKENS = 1 << 18
# A number in a token id's place goes on to the vocabulary's check; more digits than this are no id anywhere.
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


class Wire(BaseModel):
    """Frozen, nothing coerced, nothing unknown."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _stops(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    return _texts([value] if isinstance(value, str) else value, "stop", MAX_STOPS, "a string or a list of strings")


def _bad_words(value: object) -> tuple[str, ...]:
    return () if value is None else _texts(value, "bad_words", MAX_BAD_WORDS, "a list of strings")


def _texts(value: object, name: str, most: int, wanted: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InvalidRequest(f"{name} must be {wanted}", name)
    if len(value) > most:
        raise InvalidRequest(f"{name} has {len(value)} strings; the limit is {most}", name)
    for text in value:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"each string of {name} must have 1 to {MAX_STOP_CHARS} characters", name)
    return tuple(dict.fromkeys(value))


def _token_ids(value: object, name: str, most: int) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) > most:
        raise InvalidRequest(f"{name} has {len(value)} ids; the limit is {most}", name)
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise InvalidRequest(f"{name} must be a list of token ids", name)
    return tuple(sorted(set(value)))


def _stop_token_ids(value: object) -> tuple[int, ...]:
    return () if value is None else _token_ids(value, "stop_token_ids", MAX_STOP_TOKENS)


def _allowed_token_ids(value: object) -> tuple[int, ...] | None:
    tokens = None if value is None else _token_ids(value, "allowed_token_ids", MAX_ALLOWED_TOKENS)
    if tokens == ():
        raise InvalidRequest("allowed_token_ids is empty: no token could be sampled", "allowed_token_ids")
    return tokens


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise InvalidRequest("logit_bias must be an object from token ids to numbers", "logit_bias")
    if len(value) > MAX_BIASED:
        raise InvalidRequest(f"logit_bias has {len(value)} entries; the limit is {MAX_BIASED}", "logit_bias")
    found = {}
    for token, bias in value.items():
        if not _TOKEN_ID.fullmatch(token):
            raise InvalidRequest(f"logit_bias: {printable(token, 24)} is not a token id", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise InvalidRequest(f"logit_bias: the value of {token} must be a number from -100 to 100", "logit_bias")
        found[int(token)] = float(bias)
    return tuple(sorted(found.items()))


def _top_k(value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not -1 <= value < 2**31:
        raise InvalidRequest("top_k must be a whole number from 1, or 0 or -1 for every token", "top_k")
    return max(value, 0)


Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(Wire):
    """None means: not given, so that the model's own default may hold."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int | None, PlainValidator(_top_k)] = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # Below a hundredth or above a hundred nothing but noise or one token is left.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_logit_bias)] = ()
    bad_words: Annotated[tuple[str, ...], PlainValidator(_bad_words)] = ()
    allowed_token_ids: Annotated[tuple[int, ...] | None, PlainValidator(_allowed_token_ids)] = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(_stop_token_ids)] = ()
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Alternatives | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def num_choices(self) -> int:
        """`n`, with its default."""
        return self.n or 1


ModelT = TypeVar("ModelT", bound=Wire)


def seed_of_choice(seed: int, index: int) -> int:
    """Of answer `index`, from 1 on, of several to a request with `seed`: 64 bits without a sign, as `seed` has."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8])


# pydantic's words where they speak of Python
_WORDING = {
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be a string",
    "string_too_short": "should have at least {min_length} character",
    "string_too_long": "should have at most {max_length} characters",
    "model_type": "should be an object",
}


def validated(cls: type[ModelT], fields: dict[str, Any], path: str) -> ModelT:
    """`cls` made of `fields`. Raises InvalidRequest that names the first wrong field, below `path`."""
    known = cls.model_fields
    for known_as in fields:  # before pydantic, which would collect every one of a million unknown fields
        if known_as not in known:
            name = path + printable(known_as)
            raise InvalidRequest(f"unknown field {name}", name)
    try:
        return cls.model_validate(fields)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False, include_context=True)[0]
    name = path + ".".join(printable(str(part)) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        raise InvalidRequest(f"unknown field {name}", name)
    if error["type"] == "missing":
        raise InvalidRequest(f"{name} is missing", name)
    words = _WORDING.get(error["type"], error["msg"].removeprefix("Input "))
    raise InvalidRequest(f"{name}: {words.format(**error.get('ctx', {}))}", name)
