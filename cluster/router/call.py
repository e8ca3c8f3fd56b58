"""What goes into Router.generate and what comes out of it. The API codes against these; they know no text."""

from __future__ import annotations

from dataclasses import dataclass, field

from diptych.protos.constraint import Constraint
from diptych.protos.types import FinishReason, SamplingParams, StageTimes, TokenLogprobs

from .placement import Placement
from .registry import TrackedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One request in token ids. Both timeouts count from `arrived_at`; None leaves the router's own limit."""

    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    salt: bytes = b""  # hashed into the names of its KV blocks: tenants do not share KV
    timeout_s: float | None = None
    first_token_timeout_s: float | None = None  # of the whole request: any choice's first token will do
    arrived_at: float | None = None  # on the router's clock, when the head of the request was read; None: at the call
    traceparent: str = ""
    priority: int = 0  # lower is sooner, here and in the engines
    tenant: str = ""  # its weight is the configuration's; "" is a tenant too
    session: str = ""  # requests of one session go to the same engines where the policy says so
    pin: Placement | None = None  # engines to take while they live, without asking the policy
    constraint: Constraint | None = None  # what the answer must match
    tracked: TrackedRequest | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How a request was answered. Times in seconds; those of `prefill` and `decode` as each engine reported them."""

    reason: FinishReason
    num_tokens: int
    cached_tokens: int  # of the prompt, that no engine had to compute for this request
    attempts: int  # placements up to the first token
    policy: str  # that chose the engines: the configured one, or `pin`
    choice: str  # why these engines, in words
    path: str  # `pd`: prompt and answer on two engines; `local`: both on the decode engine
    queue_s: float  # for a place in the router
    ttft_s: float  # from the call to the first token; 0 without a token
    total_s: float  # from the call to the end
    prefill_engine: str
    decode_engine: str
    prefill_cached_tokens: int
    decode_cached_tokens: int
    prefill: StageTimes
    decode: StageTimes
    transfer_bytes: int
    transfer_s: float
    transport: str
    preemptions: int  # times that an engine took the request's blocks away and computed it again
    migrations: int = 0  # times that it went on elsewhere after its first token; the engines are the last ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One time that the stream to an engine broke. `cause`: see session.LossCause; `at_unix` in seconds."""

    engine: str
    epoch: int
    at_unix: float
    cause: str


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens, in order. The last delta has no tokens and the one `finish`."""

    tokens: list[int]
    finish: Explanation | None = None
    logprobs: list[TokenLogprobs | None] | None = None  # one per token; None when the call asks for none
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first delta, if asked: of prompt positions 1, 2, ...
    placement: Placement | None = None  # the engines that the tokens come from: a `pin` for calls that should join them
