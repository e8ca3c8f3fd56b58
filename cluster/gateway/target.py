"""What the gateway asks of a place that can answer: a provider's model (provider_target.py), an own pool (cluster/api).

The conformance suite of tests/cluster/gateway runs over every kind of target.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol, runtime_checkable

from diptych.cluster.providers.terms import Terms
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Event, Reply

from .record import AttemptRecord

# How an answer that broke off goes on here: exact: by token ids, inside the target, and from a text too; prefill: from
# a text, as the last assistant message; no: not at all.
Continues = Literal["exact", "prefill", "no"]


@runtime_checkable
class LacksKey(Protocol):
    """A target that may have been configured without its key."""

    @property
    def lacks(self) -> str:
        """What it needs before it can be asked, in a sentence; empty: nothing that is known."""


class Target(Protocol):
    """A place that can answer. Used by many requests at once.

    Whatever goes wrong is a ProviderFailure; other errors of protos/errors.py are translated by public.failure_of. A
    target keeps `terms` itself, and ends what it does when a call is cancelled or a stream closed.
    """

    @property
    def name(self) -> str:
        """PROVIDER/MODEL or pool/MODEL."""

    @property
    def is_own(self) -> bool:
        """Whether it is an own pool."""

    @property
    def continues(self) -> Continues:
        """How an answer that broke off goes on here."""

    @property
    def weights(self) -> str:
        """Which weights answer; empty where nobody knows. Targets with equal ones give the same answers."""

    @property
    def key_id(self) -> str:
        """Another text for another provider key, without telling the key; what failed with the old one is forgotten."""

    def check(self, request: ChatRequest) -> None:
        """Nothing, where the target can express and do what is asked. Raises ProviderFailure (UNSUPPORTED)."""

    async def whole(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> Reply:
        """The whole answer. Raises ProviderFailure."""

    def stream(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> AsyncGenerator[Event, None]:
        """The answer's events: Began first, Ended last. Raises ProviderFailure; an end without Ended is one, too."""
