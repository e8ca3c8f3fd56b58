"""What came of a batch: `BatchResult` of one item, `BatchResults` of all.

batch.py makes them. They are data, and know of no place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

from .batch_places import BatchStatus
from .errors import CallFailed
from .reply import Reply, Unset
from .usage import Spent, total

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchResult(Generic[T]):
    """Of one item. `reply` is there where the model answered with a value, or calls tools; else `error` says why not,
    with what the model said in `error.text`.
    """

    id: str
    reply: Reply[T] | None = None
    error: CallFailed | None = None

    @property
    def is_good(self) -> bool:
        """Whether it was answered: with a value, or with calls of tools."""
        return self.error is None

    @property
    def value(self) -> T:
        """The value. Raises the item's error."""
        if self.error is not None:
            raise self.error
        assert self.reply is not None
        return self.reply.value

    @property
    def spent(self) -> Spent:
        """Tokens; dollars are known of own clusters alone, others price batches otherwise."""
        attempts = self.reply.attempts if self.reply is not None else self.error.attempts if self.error else ()
        return total(attempt.spent for attempt in attempts)


class BatchResults(Sequence[BatchResult[T]]):
    """One for each item, in the items' order."""

    def __init__(self, results: Sequence[BatchResult[T]], status: BatchStatus) -> None:
        self.status = status
        self._results = tuple(results)
        self._by_id = {one.id: one for one in results}

    @overload
    def __getitem__(self, at: int) -> BatchResult[T]: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[BatchResult[T], ...]: ...
    def __getitem__(self, at: int | slice) -> BatchResult[T] | tuple[BatchResult[T], ...]:
        return self._results[at]

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[BatchResult[T]]:
        return iter(self._results)

    def by_id(self, name: str) -> BatchResult[T]:
        """Raises KeyError."""
        return self._by_id[name]

    @property
    def good(self) -> tuple[BatchResult[T], ...]:
        """Those that were answered."""
        return tuple(one for one in self if one.is_good)

    @property
    def failed(self) -> tuple[BatchResult[T], ...]:
        """Those with an error."""
        return tuple(one for one in self if not one.is_good)

    @property
    def values(self) -> dict[str, T]:
        """By ids, of those that have one: neither of failed ones nor of those whose model calls tools."""
        return {one.id: one.value for one in self.good if one.reply is None or not isinstance(one.reply.result, Unset)}

    @property
    def spent(self) -> Spent:
        """Of all items."""
        return total(one.spent for one in self)

    def __repr__(self) -> str:
        return f"BatchResults({len(self.good)} good, {len(self.failed)} failed, {self.status.state})"
