"""Names of full KV blocks, and the index from name to block.

A name covers a block's tokens and everything before it, so equal names mean equal KV under the same model and salt:
root = sha256(identity, salt) -> sha256(root, tokens of block 0) -> sha256(that, tokens of block 1) -> ...
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from diptych.protos.types import BlockHash


def root_name(identity: bytes, salt: bytes) -> BlockHash:
    """The parent of every first block. `identity` tells model, dtype and layout apart, `salt` tenants."""
    return BlockHash(hashlib.sha256(struct.pack("<Q", len(identity)) + identity + salt).digest())


def block_name(parent: bytes, tokens: Sequence[int], extra: bytes = b"") -> BlockHash:
    """The name of a full block of `tokens` after `parent`; `extra` is what else its KV depends on (adapter, image)."""
    # The count keeps (tokens, extra) unambiguous when extra is not empty.
    packed = struct.pack(f"<{len(tokens) + 1}I", len(tokens), *tokens)
    return BlockHash(hashlib.sha256(parent + packed + extra).digest())


class PrefixIndex:
    """Which block holds the content of a name: at most one block per name and one name per block."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

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
        return True

    def unbind(self, block: int) -> None:
        """Forget the name of a named block."""
        del self._block_of[self._name_of.pop(block)]

    def __len__(self) -> int:
        return len(self._block_of)

    def check(self) -> None:
        """Raise AssertionError unless both maps are each other's inverse."""
        assert self._name_of == {block: name for name, block in self._block_of.items()}, "names and blocks disagree"
