"""Request and token types that cross floors. Plain frozen dataclasses: no pydantic on the hot path."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from .constraint import Constraint, Guide

EngineId = NewType("EngineId", str)
BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)  # 32 bytes, names a block's content and everything before it


class Role(StrEnum):
    """What an engine does for a request. An engine has a set of them."""

    PREFILL = "prefill"
    DECODE = "decode"
    EMBED = "embed"  # vectors and scores of whole texts; holds no KV and has no other role beside it


GENERATING = (Role.PREFILL, Role.DECODE)  # the two that share one request
# Of these a model has one pool that it cannot answer without.
ANSWERING = frozenset({Role.DECODE, Role.EMBED})


class FinishReason(StrEnum):
    """Why a phase of a request ended. Exactly one terminal message carries it."""

    STOP = "stop"  # an end token (the engine) or a stop string (the router)
    LENGTH = "length"  # max_tokens
    HANDOFF = "handoff"  # prefill only: the decode engine owns the KV now
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, order=True)
class TransferKey:
    """One attempt at one request. `transfer_id` is 16 random bytes minted by the router, never the client's id."""

    transfer_id: bytes
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.transfer_id.hex()[:12]}/{self.attempt}"


@dataclass(frozen=True, slots=True)
class EngineRef:
    """One life of one engine and where its gRPC server listens."""

    engine_id: EngineId
    epoch: int
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Validated by the API; `temperature` 0 is greedy, `top_k` 0 keeps every token.

    The random number for generated token i of a prompt of P tokens depends on (seed, P + i) only. What each field does
    to the logits, and in which order, is defined in kernels/ops/sampling/reference.py.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # the model's end tokens included, unless ignore_eos
    min_tokens: int = 0  # no stop token is sampled before so many tokens are generated
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), by id
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never generated
    allowed_token_ids: tuple[int, ...] | None = None  # None: every token
    logprobs: int | None = None  # most likely alternatives told with every token; 0: the token's own only; None: none
    prompt_logprobs: int | None = None  # the same for the prompt's tokens but the first


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What both engines of a placement are told about a request."""

    key: TransferKey
    prompt: tuple[int, ...]  # token ids, at least one
    sampling: SamplingParams
    salt: bytes = b""  # hashed into the first block name: tenants do not share KV
    deadline: float | None = None  # on the receiving process's monotonic clock, seconds
    traceparent: str = ""
    priority: int = 0  # lower is sooner, as in vLLM
    tenant: str = ""  # whose share of the engine it uses up
    weight: float = 1.0  # of the tenant: twice the weight is twice the share, while both have work
    resume: tuple[int, ...] = ()  # generated elsewhere already; the next token is number len(resume) of the answer
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        assert 0 < self.weight < math.inf

    @property
    def known(self) -> tuple[int, ...]:
        """Prompt and resume: the ids whose KV comes before the next token."""
        return self.prompt + self.resume


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOrder:
    """Compute the known tokens, sample the next, stage the KV for `decode`."""

    request: GenerateRequest
    decode: EngineRef
    guide: Guide | None = None  # the engine's, of the request's constraint; it knows the tokens of `resume`


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOrder:
    """Fetch the known tokens' KV from `prefill` and go on after the token sampled there.

    Without `prefill`, compute the known tokens here.
    """

    request: GenerateRequest
    prefill: EngineRef | None
    allow_local_prefill: bool = True  # when the transfer fails, compute the prompt here instead of failing
    guide: Guide | None = None  # as of a PrefillOrder


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds a request spent in each stage of one engine."""

    queue: float = 0.0
    prefill: float = 0.0
    transfer: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The one terminal event of (key, role)."""

    key: TransferKey
    role: Role
    reason: FinishReason
    num_tokens: int = 0  # generated in all, `resume` and the other engine's included
    cached_tokens: int = 0  # of the known ones, found in this engine's prefix cache
    error_code: str = ""
    error_message: str = ""
    error_param: str = ""  # the field of the request that is to blame, where one is
    times: StageTimes = StageTimes()
    transfer_bytes: int = 0
    transport: str = ""
    preemptions: int = 0  # times that it lost its blocks and was computed again


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities: before temperature, filters, penalties and bias."""

    logprob: float  # of the token itself
    rank: int  # 1: no token is more likely
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first, lower ids first among equals


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the prompt's tokens at positions first, first + 1, ..., each given those before it. `first` is at least 1."""

    key: TransferKey
    first: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(slots=True)
class StepOutput:
    """What one engine step has for the routers: columns of equal length, and terminal events.

    keys[i] got tokens[i] as its generated token number indexes[i]; 0 is the first token after the prompt.
    """

    keys: list[TransferKey] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by row of the columns, where asked for
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    started: list[TransferKey] = field(default_factory=list)  # whose prompts it has begun to compute

    def add(self, key: TransferKey, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """One more row of the columns."""
        if logprobs is not None:
            self.logprobs[len(self.keys)] = logprobs
        self.keys.append(key)
        self.indexes.append(index)
        self.tokens.append(token)

    def __bool__(self) -> bool:
        return bool(self.keys or self.finishes or self.prompt_logprobs or self.started)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """Blocks of one pool by state; free + cached + used = total.

    `cached` blocks hold a reusable prefix and belong to no request.
    """

    total: int
    free: int
    cached: int
    used: int
