"""Which of several targets gets a request: each strategy gives scores, the lowest of which is chosen.

course.py picks with them, `explain` shows the scores. They see only targets that may be tried now.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from diptych.protos.messages import Message
from diptych.protos.openai import ChatRequest
from diptych.protos.wire_checks import compact

from .load import Load
from .settings import StrategyName
from .target import Target

# What a request at a target would cost at most, in the ledger's currency; None: nobody knows.
Price = Callable[[Target, ChatRequest], Decimal | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A target of a route, with what this process knows of it."""

    target: Target
    weight: float
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What strategies may know of a request. `session` names a conversation; empty: its first messages do."""

    request: ChatRequest
    session: str
    now: float


class Strategy(Protocol):
    """A way to choose."""

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """Of each member: the lower, the better. Without chance, wherever the strategy is not chance itself."""

    def pick(self, members: Sequence[Member], asked: Asked) -> Member:
        """One of `members`, of which there is at least one."""


class _Ranked:
    """The lowest score wins; of equal ones the first."""

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """By each strategy."""
        raise NotImplementedError

    def pick(self, members: Sequence[Member], asked: Asked) -> Member:
        """The best."""
        if len(members) == 1:
            return members[0]
        scores = self.scores(members, asked)
        return members[scores.index(min(scores))]


class BetterOfTwo(_Ranked):
    """Two by chance, and of them the one with fewer requests in work times latency. Taking the best of all would send
    every router's requests to the same target until all of them have noticed.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """A target that was never measured counts as the average of the others."""
        known = [member.load.latency_s(asked.now) for member in members]
        told = [latency for latency in known if latency is not None]
        usual = sum(told) / len(told) if told else 1.0
        return [
            (member.load.busy + 1) * (usual if latency is None else latency) / member.weight
            for member, latency in zip(members, known, strict=True)
        ]

    def pick(self, members: Sequence[Member], asked: Asked) -> Member:
        """The better one of two; among equals either."""
        if len(members) == 1:
            return members[0]
        first, second = self._rng.sample(range(len(members)), 2)
        scores = self.scores((members[first], members[second]), asked)
        return members[first if scores[0] <= scores[1] else second]


class Weighted(_Ranked):
    """By chance, each as often as its weight says."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """How unlikely each is."""
        total = sum(member.weight for member in members)
        return [1.0 - member.weight / total for member in members]

    def pick(self, members: Sequence[Member], asked: Asked) -> Member:
        """By chance."""
        return self._rng.choices(members, [member.weight for member in members])[0]


class Priority(_Ranked):
    """The first that may be tried, in the order of the configuration."""

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """The place."""
        return [float(place) for place in range(len(members))]


class LowestCost(_Ranked):
    """The cheapest; those whose price nobody knows come last, in the order of the configuration."""

    def __init__(self, price: Price) -> None:
        self._price = price

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """The price."""
        prices = [self._price(member.target, asked.request) for member in members]
        return [math.inf if price is None else float(price) for price in prices]


class Sticky(_Ranked):
    """A conversation stays at one target, where its prompt may be cached; when a target goes, only its conversations
    move. Rendezvous hashing: each target draws a lot for the conversation, weighted, and the best lot wins.
    """

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """The lots."""
        key = conversation_key(asked.request, asked.session)
        found = []
        for member in members:
            digest = hashlib.blake2b(member.target.name.encode(), key=key, digest_size=8).digest()
            lot = (int.from_bytes(digest) + 0.5) / 2.0**64
            found.append(-math.log(lot) / member.weight)
        return found


class OwnFirst(_Ranked):
    """Own pools before others, and among equals as another strategy says."""

    def __init__(self, among: Strategy) -> None:
        self._among = among

    def scores(self, members: Sequence[Member], asked: Asked) -> list[float]:
        """Of the other strategy; own pools of which it knows none stand behind the other own ones, and those of others
        are shifted behind all of them.
        """
        found = self._among.scores(members, asked)
        known = [score for score in found if math.isfinite(score)] or [0.0]
        top = max(known)
        shift = top - min(known) + 2.0
        return [
            min(score, top + 1.0) if member.target.is_own else score + shift
            for member, score in zip(members, found, strict=True)
        ]

    def pick(self, members: Sequence[Member], asked: Asked) -> Member:
        """Of own ones, if there are any."""
        own = [member for member in members if member.target.is_own]
        return self._among.pick(own or members, asked)


def conversation_key(request: ChatRequest, session: str = "") -> bytes:
    """What stays equal over the turns of a conversation: its session, else everything to the end of the first user's
    message, tools included.
    """
    digest = hashlib.blake2b(session.encode(errors="surrogatepass"), digest_size=32)
    if session:
        return digest.digest()
    if request.tool_use is not None:
        tools = compact([tool.told() for tool in request.tool_use.tools])
        digest.update(tools.encode(errors="surrogatepass"))
    for message in request.messages:
        digest.update(_said(message))
        if message.role == "user":
            break
    return digest.digest()


def _said(message: Message) -> bytes:
    media = [f"{part.kind}:{part.url or part.file_id or part.data}" for part in message.media]
    said = "\0".join((message.role, message.content, *media, ""))
    return said.encode(errors="surrogatepass")  # of a program half of a pair may come


def strategies(price: Price, rng: random.Random) -> Mapping[StrategyName, Strategy]:
    """All of them, by the names of the configuration."""
    return {
        "p2c": BetterOfTwo(rng),
        "weighted": Weighted(rng),
        "priority": Priority(),
        "lowest_cost": LowestCost(price),
        "sticky": Sticky(),
    }
