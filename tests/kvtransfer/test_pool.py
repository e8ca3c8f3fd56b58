"""The pool, one promise at a time; test_pool_stateful.py tries them together, in any order."""

from __future__ import annotations

import pytest

from diptych.kvtransfer.pool import BlockPool, BlockTable
from diptych.kvtransfer.prefix import NameChange, PrefixIndex, block_name, root_name, short_name


def filled(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> BlockTable:
    table = pool.open(tokens, salt, max_cached_tokens=len(tokens))
    assert table.try_grow(len(tokens))
    table.commit(tokens, len(tokens))
    return table


def test_a_block_is_found_only_after_its_commit() -> None:
    pool = BlockPool(num_blocks=8, block_tokens=2)
    first = pool.open([1, 2, 3, 4], b"", max_cached_tokens=4)
    assert first.try_grow(4)
    assert pool.open([1, 2, 3, 4], b"", max_cached_tokens=4).cached_tokens == 0
    first.commit([1, 2, 3, 4], 3)
    assert pool.open([1, 2, 3, 4], b"", max_cached_tokens=4).cached_tokens == 2


def test_equal_content_committed_twice_keeps_two_blocks_and_one_name() -> None:
    pool = BlockPool(num_blocks=8, block_tokens=2)
    one, two = (pool.open([1, 2], b"", max_cached_tokens=2) for _ in range(2))
    assert one.try_grow(2)
    assert two.try_grow(2)
    one.commit([1, 2], 2)
    two.commit([1, 2], 2)
    assert one.blocks != two.blocks
    hit = pool.open([1, 2], b"", max_cached_tokens=2)
    assert hit.blocks == one.blocks
    for table in (one, two, hit):
        table.close()
    pool.check_integrity()
    assert pool.counts().cached == 1
    assert pool.counts().free == 7


def test_another_salt_finds_nothing() -> None:
    pool = BlockPool(num_blocks=8, block_tokens=2)
    filled(pool, [1, 2, 3, 4], b"tenant a").close()
    assert pool.open([1, 2, 3, 4], b"tenant b", max_cached_tokens=4).cached_tokens == 0
    assert pool.open([1, 2, 3, 4], b"tenant a", max_cached_tokens=4).cached_tokens == 4


def test_eviction_takes_the_least_recently_used_chain_from_its_end() -> None:
    pool = BlockPool(num_blocks=6, block_tokens=1)
    filled(pool, [1, 2, 3]).close()
    filled(pool, [7, 8, 9]).close()
    pool.open([1, 2, 3], b"", max_cached_tokens=3).close()  # the first chain is the younger one now
    table = pool.open([5], b"", max_cached_tokens=0)
    assert table.try_grow(2)
    assert pool.open([1, 2, 3], b"", max_cached_tokens=3).cached_tokens == 3
    assert pool.open([7, 8, 9], b"", max_cached_tokens=3).cached_tokens == 1


def test_growth_that_does_not_fit_evicts_nothing() -> None:
    pool = BlockPool(num_blocks=3, block_tokens=1)
    filled(pool, [1, 2]).close()
    table = pool.open([9], b"", max_cached_tokens=0)
    assert not table.try_grow(4)
    assert pool.counts().cached == 2
    assert table.blocks == []
    assert pool.can_hold(3)
    assert not pool.can_hold(4)


def test_a_switched_off_cache_keeps_nothing() -> None:
    pool = BlockPool(num_blocks=3, block_tokens=1, prefix_cache=False)
    filled(pool, [1, 2]).close()
    assert pool.counts().free == 3
    assert pool.open([1, 2], b"", max_cached_tokens=2).cached_tokens == 0


def test_names_differ_by_every_ingredient() -> None:
    roots = {root_name(b"a", b""), root_name(b"", b"a"), root_name(b"a", b"b"), root_name(b"ab", b"")}
    assert len(roots) == 4
    root = root_name(b"", b"")
    names = {block_name(root, [1, 2]), block_name(root, [2, 1]), block_name(root, [1], b"\x02\0\0\0")}
    assert len(names | {block_name(next(iter(names)), [1, 2])}) == 4


def test_nonsense_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BlockPool(num_blocks=0, block_tokens=4)


def test_a_journal_that_overflows_tells_everything_instead() -> None:
    index = PrefixIndex()
    journal = index.watch(max_names=2)
    assert journal.drain() == NameChange((), reset=True)
    names = [bytes([n]) * 32 for n in range(4)]
    for block, name in enumerate(names[:3]):
        index.bind(name, block)
    index.unbind(0)
    assert journal.drain() == NameChange(tuple(map(short_name, names[1:3])), reset=True)
    index.bind(names[3], 3)
    index.unbind(1)
    assert journal.drain() == NameChange((short_name(names[3]),), (short_name(names[1]),))


def test_a_name_that_comes_and_goes_between_two_readings_is_not_told() -> None:
    index = PrefixIndex()
    journal = index.watch(max_names=8)
    index.bind(b"kept" * 8, 0)
    journal.drain()
    index.bind(b"came" * 8, 1)
    index.unbind(1)
    index.unbind(0)
    index.bind(b"kept" * 8, 2)
    assert journal.is_empty
    assert journal.drain() is None


def test_a_name_is_told_as_the_number_of_its_first_eight_bytes() -> None:
    assert short_name(bytes(range(32))) == 0x0001020304050607
