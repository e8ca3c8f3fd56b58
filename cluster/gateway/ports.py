"""What a gateway takes from outside: time and chance, money, a cache, metrics; each of them optional.

gateway.py calls them; cluster/store and cluster/api give them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from diptych.cluster.providers.fetch import Fetcher
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Reply

from .limits import Allowance
from .metrics import GatewayMetrics
from .rates import Rates
from .record import ExchangeRecord
from .rule_settings import StrategyName
from .shared_state import SharedState
from .strategies import Price
from .target import Target

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Whose request it is: `tenant` scopes caches and budgets, `session` keeps a conversation at one target. `key` is
    the id of the key that opened, `tags` are for budgets and limits. `cache`: no-store: an answer is neither looked for
    nor kept; no-cache: a new one is kept; always: whatever the temperature, where the route has a cache. `origin` is
    what the front door tells own pools of the request, see cluster/api/pool_target.py; nobody else looks at it.

    `headers` are those that rules may read, `target` and `strategy` what a client wants instead of the route's own, who
    may: cluster/api/overrides.py looks at keys for it. `choice`: which of several answers this is to be, for own pools
    whose seed the request does not say. `waited_s`: since the request arrived, before the gateway was asked; its time
    counts from there. `traceparent`: the W3C trace that it belongs to; of targets, own pools alone are told. Nothing
    else here is read from a request's body.
    """

    tenant: str = ""
    session: str = ""
    key: str = ""
    tags: tuple[str, ...] = ()
    cache: Literal["", "no-store", "no-cache", "always"] = ""
    origin: object = None
    headers: tuple[tuple[str, str], ...] = ()
    target: str = ""
    strategy: StrategyName | None = None
    choice: int = 0
    waited_s: float = 0.0
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A budget that a request falls under. `left`: part of the amount, as far as this router knows; None: nothing is
    known before the first request. `refuses`: why it would refuse the request, empty: it would not.
    """

    budget: str
    scope: str
    left: float | None
    refuses: str = ""


class Reservation(Protocol):
    """What a request may cost, set aside."""

    @property
    def allowances(self) -> tuple[Allowance, ...]:
        """What is left of the limits that it falls under."""

    async def again(self, record: ExchangeRecord) -> None:
        """Before each further attempt, behind or beside those of `record`. Raises CapacityError where what those cost
        cannot be set aside besides; the attempt is not made then.
        """

    async def settle(self, record: ExchangeRecord) -> None:
        """The request is over, however it ended; called once. `record.attempts` tell what is to be paid for."""


class Ledger(Protocol):
    """Budgets and limits."""

    async def reserve(self, request: ChatRequest, targets: Sequence[Target], context: Context) -> Reservation:
        """Before the first attempt; `targets` are those of the route. Raises RateLimited, or another error for the
        client, where the request may not be answered.
        """

    def standing(self, request: ChatRequest, targets: Sequence[Target], context: Context) -> tuple[Standing, ...]:
        """The budgets that a request to `targets` falls under. Asks nobody, and changes nothing."""


class ReplyCache(Protocol):
    """Answers that were given before. It decides itself which requests and answers it takes."""

    def takes(self, request: ChatRequest, context: Context) -> bool:
        """Whether an answer to this request may be kept."""

    async def find(self, request: ChatRequest, context: Context) -> Reply | None:
        """The answer to an equal request of the same tenant."""

    async def keep(self, request: ChatRequest, context: Context, reply: Reply) -> None:
        """A whole answer, that has ended by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Of one gateway."""

    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.Random)
    metrics: GatewayMetrics | None = None
    prices: Price | None = None
    rates: Callable[[str], Rates | None] | None = None  # of a target's name, for explanations
    ledger: Ledger | None = None
    cache: ReplyCache | None = None
    fetcher: Fetcher | None = None  # None: one with the settings' defaults
    shared: SharedState | None = None  # with other routers' gateways; None: this one is alone
    tracer: Tracer | None = None  # None: no spans are made
