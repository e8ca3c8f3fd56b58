"""A mirror that followed a pool's journal answers as the pool itself does, through any history."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.router import mirror as mirror_module
from diptych.cluster.router.mirror import PrefixMirror, PromptNames
from diptych.kvtransfer.pool import BlockPool, BlockTable
from diptych.kvtransfer.prefix import block_name

SIZE = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)
SALTS = st.sampled_from([b"", b"x"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mirror_finds_what_the_pool_would_find(data: st.DataObject) -> None:
    pool, mirror = BlockPool(num_blocks=6, block_tokens=SIZE, root=b"model"), PrefixMirror()
    journal, tables = pool.watch_names(), list[BlockTable]()
    mirror.begin(pool.prefix_root, SIZE)
    for _ in range(data.draw(st.integers(1, 12))):
        prompt, salt = data.draw(TOKENS), data.draw(SALTS)
        table = pool.open(prompt, salt, max_cached_tokens=len(prompt))
        tables.append(table)
        if table.try_grow(len(prompt)):
            table.commit(prompt, len(prompt))
        if data.draw(st.booleans()):
            tables.pop(data.draw(st.integers(0, len(tables) - 1))).close()
        if data.draw(st.booleans()) and (change := journal.drain()) is not None:
            mirror.apply(reset=change.reset, added=change.added, removed=change.removed)
    if (change := journal.drain()) is not None:
        mirror.apply(reset=change.reset, added=change.added, removed=change.removed)
    prompt, salt = data.draw(TOKENS), data.draw(SALTS)
    there = pool.open(prompt, salt, max_cached_tokens=len(prompt))
    assert mirror.cached_tokens(PromptNames(prompt, salt)) == there.cached_tokens


def test_a_chain_is_computed_once_for_all_engines_and_only_as_far_as_somebody_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    true_name = block_name

    def counting(*args: object) -> bytes:
        calls.append(args)
        return true_name(*args)  # type: ignore[arg-type]

    prompt = tuple(range(100))
    pool = BlockPool(num_blocks=60, block_tokens=SIZE, root=b"m")
    table = pool.open(prompt, b"", max_cached_tokens=0)
    assert table.try_grow(100)
    table.commit(prompt, 10)
    change = pool.watch_names().drain()
    assert change is not None
    mirrors = [PrefixMirror() for _ in range(3)]
    for one in mirrors:
        one.begin(b"m", SIZE)
        one.apply(reset=True, added=change.added, removed=())
    mirrors.append(PrefixMirror())  # of an engine that has told nothing
    names = PromptNames(prompt, b"")
    monkeypatch.setattr(mirror_module, "block_name", counting)
    assert [one.cached_tokens(names) for one in mirrors] == [10, 10, 10, 0]
    assert len(calls) == 6, "five blocks that are known and the first that is not"


def test_a_new_session_forgets_what_the_old_one_told() -> None:
    mirror, prompt = PrefixMirror(), PromptNames((1, 2), b"")
    pool = BlockPool(num_blocks=1, block_tokens=2, root=b"m")
    table = pool.open((1, 2), b"", max_cached_tokens=0)
    assert table.try_grow(2)
    table.commit((1, 2), 2)
    change = pool.watch_names().drain()
    assert change is not None
    mirror.begin(b"m", 2)
    mirror.apply(reset=True, added=change.added, removed=())
    assert mirror.cached_tokens(prompt) == 2
    mirror.begin(b"m", 2)
    assert mirror.cached_tokens(prompt) == 0


def test_an_engine_that_keeps_no_prefix_has_nothing_cached() -> None:
    mirror = PrefixMirror()
    mirror.begin(BlockPool(num_blocks=1, block_tokens=2, root=b"m", prefix_cache=False).prefix_root, 2)
    mirror.apply(reset=True, added=(1, 2, 3), removed=())
    assert mirror.cached_tokens(PromptNames((1, 2), b"")) == 0
