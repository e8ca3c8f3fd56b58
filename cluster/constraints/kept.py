"""What was made lately, kept for the next request with the same schema or tools: bounded in number and in bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")


class Newest(Generic[ValueT]):
    """The newest values, at most `max_count` and `max_bytes` together. Safe for threads."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.bytes_held = 0
        self._kept: OrderedDict[bytes, tuple[ValueT, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> ValueT | None:
        """The value under this key, which becomes the newest."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: bytes, value: ValueT, size_bytes: int) -> None:
        """Keep a value of about this size; the oldest ones go."""
        with self._lock:
            before = self._kept.pop(key, None)
            self.bytes_held += size_bytes - (before[1] if before else 0)
            self._kept[key] = (value, size_bytes)
            while len(self._kept) > self.max_count or (self._kept and self.bytes_held > self.max_bytes):
                _, (_, size) = self._kept.popitem(last=False)
                self.bytes_held -= size


def key_of(*texts: str) -> bytes:
    """The key of some texts in this order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
