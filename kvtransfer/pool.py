"""Accounting of KV blocks: who uses which, which prefix it holds, which goes next.

A block is free (no content of worth), cached (named, no user) or used (in at least one table). Workers call it from the
step thread; it knows nothing of memory, transfers or time.

    open ----> hits pinned --try_grow--> own blocks --commit--> full blocks named --close--> cached (named) or free
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from diptych.protos.types import BlockHash, PoolCounts

from .prefix import NameJournal, PrefixIndex, block_name, root_name

MAX_NAMES_UNTOLD = 16_384


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens each. `root` is the identity hashed into every name."""

    def __init__(self, *, num_blocks: int, block_tokens: int, root: bytes = b"", prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"num_blocks and block_tokens must be positive, got {num_blocks} and {block_tokens}")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self._root = root
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index = PrefixIndex()
        self._tables: set[BlockTable] = set()

    def open(self, prompt: Sequence[int], salt: bytes, *, max_cached_tokens: int) -> BlockTable:
        """A table that starts with the longest cached prefix of `prompt`: whole blocks, at most `max_cached_tokens`."""
        parent = root_name(self._root, salt)
        blocks: list[int] = []
        if self.prefix_cache:
            size = self.block_tokens
            for start in range(0, min(len(prompt), max_cached_tokens) // size * size, size):
                name = block_name(parent, prompt[start : start + size])
                block = self._index.find(name)
                if block is None:
                    break
                parent = name
                blocks.append(block)
        for block in blocks:
            self._pin(block)
        table = BlockTable(self, blocks, parent)
        self._tables.add(table)
        return table

    @property
    def prefix_root(self) -> bytes:
        """The identity hashed into every name; empty when no prefix is kept."""
        return self._root if self.prefix_cache else b""

    def watch_names(self) -> NameJournal:
        """A journal of the blocks that become reusable or are evicted, for one reader in the step thread."""
        return self._index.watch(min(self.num_blocks, MAX_NAMES_UNTOLD))

    def counts(self) -> PoolCounts:
        """Blocks by state."""
        free, cached = len(self._free), len(self._cached)
        return PoolCounts(total=self.num_blocks, free=free, cached=cached, used=self.num_blocks - free - cached)

    def can_hold(self, num_tokens: int) -> bool:
        """Whether an empty pool could hold so many tokens at all."""
        return self._blocks_for(num_tokens) <= self.num_blocks

    def drop_cache(self) -> None:
        """Forget every cached block that no table uses. Named blocks in use keep their names."""
        while self._cached:
            self._free.append(self._evict())

    def check_integrity(self) -> None:
        """Raise AssertionError, with the sums, unless each block is in exactly one state and all references add up."""
        refs = [0] * self.num_blocks
        for table in self._tables:
            assert len(set(table.blocks)) == len(table.blocks), f"a table holds a block twice: {table.blocks}"
            for block in table.blocks:
                refs[block] += 1
        assert refs == self._refs, f"references of the tables {refs}, counted {self._refs}"
        used = {block for block, count in enumerate(refs) if count}
        free, cached = set(self._free), set(self._cached)
        sums = f"free {len(self._free)} + cached {len(cached)} + used {len(used)} of {self.num_blocks}"
        assert len(self._free) == len(free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.num_blocks, sums
        assert free | cached | used == set(range(self.num_blocks)), sums
        self._index.check()
        assert all(self._index.has_name(block) for block in cached), "a cached block has no name"
        assert not any(self._index.has_name(block) for block in free), "a free block has a name"
        for block, count in enumerate(refs):
            assert count <= 1 or self._index.has_name(block), f"block {block} is shared without a name"

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def _pin(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._index.unbind(block)
        return block

    def _try_take(self, count: int) -> list[int] | None:
        if count > len(self._free) + len(self._cached):
            return None
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._refs[block] = 1
        return taken

    def _name(self, name: BlockHash, block: int) -> None:
        # A block that holds the same content under that name already stays the one that is found; this one stays
        # private to its table and becomes free with it.
        self._index.bind(name, block)

    def _release(self, table: BlockTable) -> None:
        self._tables.discard(table)
        # Last block first: a prefix outlives what follows it, which could not be found without it.
        for block in reversed(table.blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._index.has_name(block):
                self._cached[block] = None
            else:
                self._free.append(block)


class BlockTable:
    """The blocks of one request, in order of position. Made by `BlockPool.open`; `close` it exactly when nobody
    computes with, reads or writes its blocks any more.
    """

    def __init__(self, pool: BlockPool, blocks: list[int], parent: BlockHash) -> None:
        self.blocks = blocks
        self.cached_tokens = len(blocks) * pool.block_tokens
        self._pool = pool
        self._parent = parent  # name of the last block that is named or was committed
        self._num_committed = len(blocks)
        self._foreseen: deque[BlockHash] = deque()  # names of the blocks behind those
        self._closed = False

    def try_grow(self, num_tokens: int) -> bool:
        """Own blocks for positions 0 .. num_tokens - 1. All or nothing; cached blocks give way, oldest first."""
        assert not self._closed
        missing = self._pool._blocks_for(num_tokens) - len(self.blocks)
        if missing <= 0:
            return True
        taken = self._pool._try_take(missing)
        if taken is None:
            return False
        self.blocks.extend(taken)
        return True

    def commit(self, tokens: Sequence[int], num_tokens: int) -> None:
        """The KV of positions 0 .. num_tokens - 1 is valid: name the full blocks among them.

        `tokens` are the ids of at least those positions, the same at every call. KV that came from a peer must be
        verified before.
        """
        assert not self._closed
        size = self._pool.block_tokens
        assert num_tokens <= min(len(tokens), len(self.blocks) * size), (num_tokens, len(tokens), len(self.blocks))
        if not self._pool.prefix_cache:
            return
        self.foresee(tokens, num_tokens)
        for at in range(self._num_committed, num_tokens // size):
            self._parent = self._foreseen.popleft()
            self._pool._name(self._parent, self.blocks[at])
            self._num_committed = at + 1

    def foresee(self, tokens: Sequence[int], num_tokens: int) -> None:
        """Work out the names that `commit` of these positions will give, 2 us a block, for which nobody waits while a
        device computes them.
        """
        if not self._pool.prefix_cache:
            return
        size = self._pool.block_tokens
        parent = self._foreseen[-1] if self._foreseen else self._parent
        for at in range(self._num_committed + len(self._foreseen), num_tokens // size):
            parent = block_name(parent, tokens[at * size : (at + 1) * size])
            self._foreseen.append(parent)

    def extend_prefix(self, tokens: Sequence[int], num_tokens: int, *, max_cached_tokens: int) -> int:
        """Blocks that others have committed since `open`, in place of own ones that hold nothing yet.

        KV of positions 0 .. num_tokens - 1 is valid now; returns how many are valid then, at least `num_tokens`.
        """
        assert not self._closed
        size, pool = self._pool.block_tokens, self._pool
        if num_tokens != self._num_committed * size or not pool.prefix_cache:
            return num_tokens
        limit = min(len(self.blocks), len(tokens) // size, max_cached_tokens // size)
        for at in range(self._num_committed, limit):
            name = block_name(self._parent, tokens[at * size : (at + 1) * size])
            block = pool._index.find(name)
            if block is None:
                break
            own, self.blocks[at] = self.blocks[at], block
            pool._pin(block)
            pool._refs[own] -= 1
            pool._free.append(own)
            self._parent = name
            self._num_committed = at + 1
            self._foreseen.clear()
        return self._num_committed * size

    def close(self) -> None:
        """Drop all references. Idempotent; the table is empty afterwards."""
        if self._closed:
            return
        self._closed = True
        self._pool._release(self)
        self.blocks = []
