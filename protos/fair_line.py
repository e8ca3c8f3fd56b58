"""The order in which requests get what is scarce: blocks, seats, the tokens of a step. Used by both schedulers.

    priority, lower first -> put back first -> tenant with the least virtual time -> earliest deadline -> arrival

Start-time fair queueing: a tenant's virtual time grows by tokens / weight as it is charged, and one that begins to wait
starts no earlier than the others are, so nobody saves up credit. Pure: no clock, no random numbers, no pool.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

from .types import GenerateRequest, TransferKey

T = TypeVar("T")
K = TypeVar("K", int, tuple[int, TransferKey], tuple[float, int, TransferKey], tuple[float, float, int, str])

# Of a tenant's turns one in so many goes to whoever waits longest: requests with deadlines, however many come, cannot
# hold back those without for ever.
TURNS_PER_OLDEST = 8
SPARE_ACCOUNTS = 64  # tenants that do not wait are looked through only when there are more of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What decides when a request's turn comes."""

    arrival: int  # unique in a line; lower came earlier
    priority: int = 0  # lower is sooner
    tenant: str = ""
    weight: float = 1.0
    deadline: float = math.inf

    @classmethod
    def of(cls, request: GenerateRequest, arrival: int) -> Self:
        """The place of a request that is the `arrival`-th."""
        deadline = math.inf if request.deadline is None else request.deadline
        return cls(
            arrival=arrival,
            priority=request.priority,
            tenant=request.tenant,
            weight=request.weight,
            deadline=deadline,
        )

    @property
    def urgency(self) -> tuple[int, int]:
        """Who gives way: the greatest goes first. The lowest urgency is a high priority number, then youth."""
        return (self.priority, self.arrival)


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    place: Place
    front: bool


@dataclass(slots=True)
class _Account:
    """One tenant within one priority."""

    weight: float
    virtual: float
    by_deadline: list[tuple[float, int, TransferKey]] = field(default_factory=list)
    by_arrival: list[tuple[int, TransferKey]] = field(default_factory=list)
    turns: int = 0
    in_turn: bool = False  # one of its own has left for its turn and is not charged yet
    rank: tuple[float, float, int, str] | None = None  # as it stands in the lane's order; None: not there

    def next_key(self) -> TransferKey:
        """Whose turn it is among the tenant's own."""
        if self.turns % TURNS_PER_OLDEST == TURNS_PER_OLDEST - 1:
            return self.by_arrival[0][1]
        return self.by_deadline[0][2]


class _Lane:
    """Those of one priority. Exists while somebody of that priority waits."""

    def __init__(self) -> None:
        self.front: list[tuple[int, TransferKey]] = []
        self.accounts: dict[str, _Account] = {}
        self.size = 0
        self.virtual = 0.0  # where a tenant starts that begins to wait
        self._order: list[tuple[float, float, int, str]] = []  # of tenants that wait
        self._moved: set[str] = set()  # tenants whose place in the order may be wrong
        self._weight = 0.0  # of the tenants that wait

    def add(self, key: TransferKey, place: Place, credit: float) -> None:
        account = self.accounts.get(place.tenant)
        if account is None:
            self._forget_idle()
            account = self.accounts[place.tenant] = _Account(place.weight, self.virtual)
        if not account.by_arrival:
            account.weight = place.weight
            account.virtual = max(account.virtual, self.virtual - credit / account.weight)
            self._weight += account.weight
        insort(account.by_deadline, (place.deadline, place.arrival, key))
        insort(account.by_arrival, (place.arrival, key))
        self._moved.add(place.tenant)

    def remove(self, key: TransferKey, place: Place) -> None:
        account = self.accounts[place.tenant]
        _remove(account.by_deadline, (place.deadline, place.arrival, key))
        _remove(account.by_arrival, (place.arrival, key))
        if not account.by_arrival:
            self._weight -= account.weight
        self._moved.add(place.tenant)

    def begin(self, tenant: str) -> None:
        """One of the tenant's own is about to get its turn."""
        account = self.accounts[tenant]
        self.virtual = max(self.virtual, account.virtual)
        account.turns += 1
        account.in_turn = True

    def charge(self, place: Place, tokens: int) -> None:
        account = self.accounts.get(place.tenant)
        if account is None:
            account = self.accounts[place.tenant] = _Account(place.weight, self.virtual)
        account.virtual += tokens / place.weight
        # Newcomers start where those who wait are on average. Were it the start of the last turn alone, ever new
        # tenants, each with one request, could hold back one who waits. What a tenant that does not wait uses up
        # moves nobody else.
        if account.by_arrival or account.in_turn:
            waiting = self._weight + (0.0 if account.by_arrival else place.weight)
            self.virtual += tokens / max(waiting, place.weight)
        account.in_turn = False
        self._moved.add(place.tenant)

    def head(self) -> TransferKey:
        if self.front:
            return self.front[0][1]
        for tenant in self._moved:
            account = self.accounts.get(tenant)
            if account is None:
                continue
            if account.rank is not None:
                _remove(self._order, account.rank)
                account.rank = None
            if account.by_arrival:
                entry = account.by_deadline[0]
                account.rank = (account.virtual, entry[0], entry[1], tenant)
                insort(self._order, account.rank)
        self._moved.clear()
        return self.accounts[self._order[0][3]].next_key()

    def _forget_idle(self) -> None:
        """Of a tenant that does not wait and would start like a newcomer nothing needs to be known."""
        waiting = len(self._order) + len(self._moved)
        if len(self.accounts) > 2 * waiting + SPARE_ACCOUNTS:
            for tenant, account in list(self.accounts.items()):
                if not account.by_arrival and account.rank is None and account.virtual <= self.virtual:
                    del self.accounts[tenant]


class FairLine(Generic[T]):
    """A line of requests by key. Looking at the head, joining and leaving take the time of a binary search.

    With `credit`, so many tokens (of weight 1) a known tenant that used less than its share before may have at once:
    the few requests of one that rarely asks go first, and nobody waits longer for it than those tokens take.
    """

    def __init__(self) -> None:
        self.credit = 0.0
        self._entries: dict[TransferKey, _Entry[T]] = {}
        self._lanes: dict[int, _Lane] = {}
        self._priorities: list[int] = []  # of the lanes, sorted

    def add(self, key: TransferKey, item: T, place: Place, *, front: bool = False) -> None:
        """Join the line; `front`: before all others of the same priority, the oldest of those first."""
        assert key not in self._entries, f"{key} waits already"
        self._entries[key] = _Entry(item, place, front)
        lane = self._lanes.get(place.priority)
        if lane is None:
            lane = self._lanes[place.priority] = _Lane()
            insort(self._priorities, place.priority)
        lane.size += 1
        if front:
            insort(lane.front, (place.arrival, key))
        else:
            lane.add(key, place, self.credit)

    def head(self) -> T | None:
        """Whose turn it is, or None when nobody waits. It stays in the line."""
        if not self._priorities:
            return None
        return self._entries[self._lanes[self._priorities[0]].head()].item

    def take(self, key: TransferKey) -> T:
        """Somebody's turn has come: it leaves the line. Charge it for what it gets."""
        entry = self._entries[key]
        if not entry.front:
            self._lanes[entry.place.priority].begin(entry.place.tenant)
        self._remove(key)
        return entry.item

    def discard(self, key: TransferKey) -> None:
        """Leave the line without a turn; unknown keys are ignored."""
        if key in self._entries:
            self._remove(key)

    def charge(self, place: Place, tokens: int) -> None:
        """The tenant of `place` got something worth so many tokens. Forgotten while nobody of the priority waits."""
        lane = self._lanes.get(place.priority)
        if lane is not None:
            lane.charge(place, tokens)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: TransferKey) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[T]:
        """Everybody, in the order of joining."""
        return (entry.item for entry in self._entries.values())

    def _remove(self, key: TransferKey) -> None:
        entry = self._entries.pop(key)
        priority = entry.place.priority
        lane = self._lanes[priority]
        if entry.front:
            _remove(lane.front, (entry.place.arrival, key))
        else:
            lane.remove(key, entry.place)
        lane.size -= 1
        if not lane.size:
            del self._lanes[priority]
            _remove(self._priorities, priority)


def _remove(ordered: list[K], value: K) -> None:
    at = bisect_left(ordered, value)
    assert ordered[at] == value
    del ordered[at]
