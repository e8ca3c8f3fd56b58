"""What other threads have for the step thread, in order. Orders are bounded in number; cancels and transfer events are
bounded by the orders they belong to and always get in.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from diptych.protos.ports import ReceiveEvent, SendEvent
from diptych.protos.types import DecodeOrder, PrefillOrder, Role, TransferKey


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """End a request of one role."""

    role: Role
    key: TransferKey


@dataclass(frozen=True, slots=True)
class TransferNews:
    """An event of one end of the hinge; `role` is the worker it is for."""

    role: Role
    event: SendEvent | ReceiveEvent


InboxItem = PrefillOrder | DecodeOrder | CancelRequest | TransferNews


class Inbox:
    """Many writers, one reader. The reader sleeps on it; a write wakes it."""

    def __init__(self, max_orders: int) -> None:
        self._items: deque[InboxItem] = deque()
        self._orders = 0
        self._max_orders = max_orders
        self._changed = threading.Condition()
        self._closed = False
        self._woken = False

    def try_put(self, item: InboxItem) -> bool:
        """False: the inbox holds `max_orders` orders already, and this is one more."""
        is_order = isinstance(item, PrefillOrder | DecodeOrder)
        with self._changed:
            if is_order and self._orders >= self._max_orders:
                return False
            self._orders += is_order
            self._items.append(item)
            self._changed.notify()
        return True

    def put(self, item: CancelRequest | TransferNews) -> None:
        """Never refused."""
        self.try_put(item)

    def take_all(self, timeout_s: float | None) -> list[InboxItem]:
        """All that arrived, oldest first; waits up to `timeout_s` (None: for ever) for a first item or `close`."""
        with self._changed:
            if not self._items and not self._closed and not self._woken and timeout_s != 0:
                self._changed.wait(timeout_s)
            self._woken = False
            items = list(self._items)
            self._items.clear()
            self._orders = 0
        return items

    def wake(self) -> None:
        """The reader sleeps no longer, or not the next time."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self) -> None:
        """Wake the reader now and let it never sleep again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
