"""Names of full KV blocks, the index from name to block, and the journal of what the index gained and lost.

A name covers a block's tokens and everything before it, so equal names mean equal KV under the same model and salt:
root = sha256(identity, salt) -> sha256(root, tokens of block 0) -> sha256(that, tokens of block 1) -> ...
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from diptych.protos.types import BlockHash


def root_name(identity: bytes, salt: bytes) -> BlockHash:
    """The parent of every first block. `identity` tells model, dtype and layout apart, `salt` tenants."""
    return BlockHash(hashlib.sha256(struct.pack("<Q", len(identity)) + identity + salt).digest())


def block_name(parent: bytes, tokens: Sequence[int], extra: bytes = b"") -> BlockHash:
    """The name of a full block of `tokens` after `parent`; `extra` is what else its KV depends on (adapter, image)."""
    # The count keeps (tokens, extra) unambiguous when extra is not empty.
    packed = struct.pack(f"<{len(tokens) + 1}I", len(tokens), *tokens)
    return BlockHash(hashlib.sha256(parent + packed + extra).digest())


def short_name(name: bytes) -> int:
    """The first 8 bytes as a big-endian number: how names are told to routers, which only estimate with them."""
    return int.from_bytes(name[:8], "big")


@dataclass(frozen=True, slots=True)
class NameChange:
    """What an index gained and lost, as short names; with `reset`, `added` is all that it holds."""

    added: tuple[int, ...]
    removed: tuple[int, ...] = ()
    reset: bool = False


class NameJournal:
    """What an index gained and lost since the last `drain`. A name that came and went leaves no trace; beyond
    `max_names` the journal forgets the changes and tells everything instead.
    """

    def __init__(self, index: PrefixIndex, max_names: int) -> None:
        self._index = index
        self._max_names = max_names
        self._changes: dict[bytes, bool] = {}  # True: gained
        self._is_whole = True  # the next drain tells everything; so does the first

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self._changes or self._is_whole)

    def note(self, name: bytes, is_gained: bool) -> None:
        """The index binds or unbinds a name now."""
        if self._is_whole:
            return
        if self._changes.pop(name, is_gained) is is_gained:
            self._changes[name] = is_gained
            if len(self._changes) > self._max_names:
                self._changes.clear()
                self._is_whole = True

    def drain(self) -> NameChange | None:
        """All changes since the last call, or None."""
        if self._is_whole:
            self._is_whole = False
            return NameChange(tuple(map(short_name, self._index.names())), reset=True)
        if not self._changes:
            return None
        changes, self._changes = self._changes, {}
        added = tuple(short_name(name) for name, is_gained in changes.items() if is_gained)
        return NameChange(added, tuple(short_name(name) for name, is_gained in changes.items() if not is_gained))


class PrefixIndex:
    """Which block holds the content of a name: at most one block per name and one name per block."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._journal: NameJournal | None = None

    def watch(self, max_names: int) -> NameJournal:
        """From now on changes are noted in the journal returned; an earlier one gets no more."""
        self._journal = NameJournal(self, max_names)
        return self._journal

    def names(self) -> Collection[bytes]:
        """All names that are bound."""
        return self._block_of.keys()

    def find(self, name: bytes) -> int | None:
        """The block of that name, or None."""
        return self._block_of.get(name)

    def has_name(self, block: int) -> bool:
        """Whether the block can be found by a name."""
        return block in self._name_of

    def bind(self, name: bytes, block: int) -> bool:
        """Name a block that has no name. False: another block has that name already, nothing changed."""
        assert block not in self._name_of
        if self._block_of.setdefault(name, block) != block:
            return False
        self._name_of[block] = name
        if self._journal is not None:
            self._journal.note(name, is_gained=True)
        return True

    def unbind(self, block: int) -> None:
        """Forget the name of a named block."""
        name = self._name_of.pop(block)
        del self._block_of[name]
        if self._journal is not None:
            self._journal.note(name, is_gained=False)

    def __len__(self) -> int:
        return len(self._block_of)

    def check(self) -> None:
        """Raise AssertionError unless both maps are each other's inverse."""
        assert self._name_of == {block: name for name, block in self._block_of.items()}, "names and blocks disagree"
