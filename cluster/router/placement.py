"""Which prefill and which decode engine a request gets: what a policy sees, what it answers, and what every policy
shares: pins, prompts that the decode engine computes itself, models without prefill engines. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from diptych.protos.types import EngineRef

from .estimate import DEFAULT_RATES, NOTHING_RESERVED, EngineRates, Reserved
from .mirror import PrefixMirror, PromptNames


@dataclass(frozen=True, slots=True)
class Placement:
    """The engines of one attempt; without `prefill` the decode engine computes the prompt too."""

    prefill: EngineRef | None
    decode: EngineRef


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A live engine as a policy sees it."""

    ref: EngineRef
    in_flight: int  # phases of this router's requests that the engine works on
    same_role: int  # those of them in the role that is being placed
    reported: int  # requests running and waiting there, other routers' included, as of its last status
    reserved: Reserved = NOTHING_RESERVED  # sent there since that status
    queued_tokens: int = 0  # of prompts, not computed yet, as of its last status
    sequences: int = 0  # that it generates for, as of its last status
    kv_tokens: int = 0  # of those sequences
    used_blocks: int = 0
    num_blocks: int = 1
    block_tokens: int = 1
    rates: EngineRates = DEFAULT_RATES
    mirror: PrefixMirror = field(default_factory=PrefixMirror)

    @property
    def load(self) -> int:
        """Requests that a new one would wait beside."""
        return max(self.in_flight, self.reported + self.reserved.requests)

    @property
    def rank(self) -> tuple[int, int, str]:
        """Smaller is less loaded. No two engines are equal: names decide, so that a choice can be repeated."""
        return self.load, self.same_role, self.ref.engine_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as a policy sees it."""

    model: str
    names: PromptNames
    session: tuple[str, str] | None = None  # (tenant, session id)
    reads_cache: bool = True  # False: the whole prompt is computed, whatever is cached

    def lacks(self, engine: EngineLoad) -> int:
        """Prompt tokens that `engine` would have to compute; at least the last one."""
        cached = engine.mirror.cached_tokens(self.names) if self.reads_cache else 0
        return max(self.names.num_tokens - cached, 1)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a policy answers; `words` say why."""

    prefill: EngineLoad | None
    decode: EngineLoad
    words: str


class PlacementPolicy(Protocol):
    """Chooses among live engines of one model. `sees_caches`: it asks what engines have of the prompt."""

    name: str
    sees_caches: bool

    def choose(self, ask: Ask, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Choice:
        """The engines for one attempt. `decode` is not empty; without `prefill` the choice has none.

        Never the same engine twice: it needs no handoff to itself.
        """


Reason = Literal["policy", "pinned", "short", "no_prefill", "colocated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A placement and why."""

    placement: Placement
    policy: str
    reason: Reason
    choice: str  # the reason in words
    lacks: int  # prompt tokens to compute; all of them where the policy sees no caches

    @property
    def path(self) -> str:
        """`pd`: prompt and answer on two engines; `local`: both on the decode engine."""
        return "local" if self.placement.prefill is None else "pd"


@dataclass(frozen=True, slots=True)
class Placer:
    """A policy, and what holds whatever the policy is. `local_below`: see PlacementSettings.local_prefill_below."""

    policy: PlacementPolicy
    local_below: int = 0

    def place(
        self,
        ask: Ask,
        prefill: Sequence[EngineLoad],
        decode: Sequence[EngineLoad],
        *,
        pin: Placement | None = None,
        is_colocated: bool = False,
    ) -> Decision:
        """`decode` is not empty. A pin holds while its engines are among those given."""
        policy, choice = "pin", _pinned(pin, prefill, decode)
        reason: Reason = "pinned"
        if choice is None:
            policy, choice = self.policy.name, self.policy.choose(ask, prefill, decode)
            reason = "policy"
        first, words = choice.prefill, choice.words
        if prefill and self.local_below and (short := ask.lacks(choice.decode)) < self.local_below:
            first, reason, words = None, "short", f"local: {short} tokens < {self.local_below}"
        elif first is None and reason == "policy" and is_colocated:
            reason = "colocated"
        elif first is None and reason == "policy":
            reason, words = "no_prefill", f"no other engine computes prompts now; {words}"
        # Whoever looks at no cache needs no names: hashing a long prompt takes a tenth of a millisecond.
        lacks = ask.lacks(first or choice.decode) if self.policy.sees_caches else ask.names.num_tokens
        placement = Placement(first.ref if first is not None else None, choice.decode.ref)
        return Decision(placement=placement, policy=policy, reason=reason, choice=words, lacks=lacks)


def _pinned(pin: Placement | None, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Choice | None:
    if pin is None:
        return None
    first = next((engine for engine in prefill if engine.ref == pin.prefill), None)
    then = next((engine for engine in decode if engine.ref == pin.decode), None)
    if then is None or (first is None and pin.prefill is not None):
        return None
    return Choice(first, then, "the engines that it was pinned to")


def others(engines: Sequence[EngineLoad], taken: EngineLoad) -> list[EngineLoad]:
    """Those that are not `taken`."""
    return [engine for engine in engines if engine.ref.engine_id != taken.ref.engine_id]
