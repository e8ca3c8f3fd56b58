"""Where budgets and spend are kept: what the ledger asks of it, and one in memory for a gateway without a store.

stored_books.py keeps them in cluster/store, for all routers together. Money is nano-dollars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final, NamedTuple, Protocol

from .matching import present_periods

# Characters of names, as the store has room for them.
MAX_TENANT: Final = 128
MAX_KEY: Final = 64
MAX_ROUTE: Final = 256
MAX_TARGET: Final = 384


class AccountId(NamedTuple):
    """`scope`: whose, where a budget has an account for each; `period`: 2026-11-23, 2026-11, or nothing."""

    budget: str
    scope: str
    period: str


@dataclass(frozen=True, slots=True)
class Grant:
    """`nanos` 0: as many as are needed are not left. `spent`: of the account, by everybody, as far as is known."""

    nanos: int
    spent: int


@dataclass(slots=True)
class Flow:
    """Since the last batch: what was spent, and by how much the lease became larger (or smaller) besides grants."""

    spent: int = 0
    leased: int = 0


class SpendKey(NamedTuple):
    """Of what a tally is. `hour` is its first second since 1970."""

    hour: int
    tenant: str
    key_id: str
    route: str
    target: str


@dataclass(slots=True)
class Tally:
    """What requests used. Of `unpriced` exchanges nobody knows the cost, or not all of it, of `estimated` ones nobody
    told the tokens.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cost_nanos: int = 0
    unpriced: int = 0
    estimated: int = 0

    def add(self, other: Tally) -> None:
        """Both together."""
        for name in Tally.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def told(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a router has to tell. `number` counts its batches from 1: one that is sent again is applied once."""

    holder: str
    number: int
    now: float  # seconds since 1970
    flows: Mapping[AccountId, Flow] = field(default_factory=dict)
    spend: Mapping[SpendKey, Tally] = field(default_factory=dict)
    is_last: bool = False  # the router ends


class Books(Protocol):
    """For all routers. Both raise CapacityError where they cannot be reached now."""

    async def take(self, holder: str, account: AccountId, *, amount: int, want: int, need: int) -> Grant:
        """Into the lease of `holder`: `want` if they are left of the budget's `amount`, or less; `need` at least."""

    async def flush(self, batch: Batch) -> int:
        """Apply it; how many routers live."""


@dataclass(slots=True)
class _Kept:
    spent: int = 0
    leases: dict[str, int] = field(default_factory=dict)

    @property
    def committed(self) -> int:
        return self.spent + sum(self.leases.values())


class MemoryBooks:
    """Of one process, and gone with it. Beyond `max_rows` the oldest spend goes, and accounts whose period is over."""

    def __init__(self, max_rows: int = 100_000) -> None:
        self.accounts: dict[AccountId, _Kept] = {}
        self.spend: dict[SpendKey, Tally] = {}
        self._flushes: dict[str, int] = {}
        self._max_rows = max_rows
        self._tidy_beyond = max_rows  # accounts

    async def take(self, holder: str, account: AccountId, *, amount: int, want: int, need: int) -> Grant:
        """As Books'."""
        kept = self.accounts.setdefault(account, _Kept())
        left = amount - kept.committed
        if left < need:
            return Grant(0, kept.spent)
        taken = want if left >= want * 4 else max(need, min(want, left // 4))
        kept.leases[holder] = kept.leases.get(holder, 0) + taken
        return Grant(taken, kept.spent)

    async def flush(self, batch: Batch) -> int:
        """As Books'."""
        if self._flushes.get(batch.holder, 0) < batch.number:
            self._flushes[batch.holder] = batch.number
            for account, flow in batch.flows.items():
                kept = self.accounts.setdefault(account, _Kept())
                kept.spent += flow.spent
                kept.leases[batch.holder] = kept.leases.get(batch.holder, 0) + flow.leased
            for key, tally in batch.spend.items():
                self.spend.setdefault(key, Tally()).add(tally)
            self._tidy(batch.now)
        if batch.is_last:
            self._flushes.pop(batch.holder, None)
        return max(len(self._flushes), 1)

    def _tidy(self, now: float) -> None:
        while len(self.spend) > self._max_rows:
            del self.spend[next(iter(self.spend))]
        if len(self.accounts) > self._tidy_beyond:
            present = set(present_periods(now))
            over = [found for found, kept in self.accounts.items() if not any(kept.leases.values())]
            for found in over:
                if found.period not in present:
                    del self.accounts[found]
            self._tidy_beyond = max(self._max_rows, 2 * len(self.accounts))
