"""Hypothesis against the prefix index and its journal: a reader that follows the journal knows what the index holds."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from diptych.kvtransfer.prefix import NameJournal, PrefixIndex, block_name, root_name, short_name

NAMES = [block_name(root_name(b"r", salt), [number]) for salt in (b"", b"a") for number in range(8)]


class IndexMachine(RuleBasedStateMachine):
    """`bound` is the model: name to block. `told` is what the present reader of the journal believes."""

    @initialize()
    def begin(self) -> None:
        self.index = PrefixIndex()
        self.bound: dict[bytes, int] = {}
        self.journal: NameJournal | None = None
        self.told: set[int] = set()

    @rule(name=st.sampled_from(NAMES), block=st.integers(0, 9))
    def bind(self, name: bytes, block: int) -> None:
        if block in self.bound.values():
            return  # a block has one name
        fresh = name not in self.bound
        assert self.index.bind(name, block) is fresh, "the first block of a name stays the one that is found"
        if fresh:
            self.bound[name] = block

    @rule(block=st.integers(0, 9))
    def unbind(self, block: int) -> None:
        names = [name for name, bound in self.bound.items() if bound == block]
        assert self.index.has_name(block) is bool(names)
        if names:
            self.index.unbind(block)
            del self.bound[names[0]]

    @rule(max_names=st.sampled_from([1, 3, 100]))
    def watch(self, max_names: int) -> None:
        self.journal = self.index.watch(max_names)
        self.told = set()

    @rule()
    def drain(self) -> None:
        if self.journal is None:
            return
        change = self.journal.drain()
        if change is not None and change.reset:
            self.told = set(change.added)
            assert not change.removed
        elif change is not None:
            assert self.told.isdisjoint(change.added), "what is known already is told again"
            assert self.told >= set(change.removed), "what was never told is taken back"
            self.told = (self.told | set(change.added)) - set(change.removed)
        assert self.told == {short_name(name) for name in self.bound}
        assert self.journal.is_empty

    @invariant()
    def the_index_is_the_model(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        assert len(self.index) == len(self.bound)
        for name in NAMES:
            assert self.index.find(name) == self.bound.get(name)

    @invariant()
    def an_empty_journal_means_that_the_reader_knows_all(self) -> None:
        journal = getattr(self, "journal", None)
        if journal is not None and journal.is_empty:
            assert self.told == {short_name(name) for name in self.bound}


TestPrefixIndex = IndexMachine.TestCase
if settings.get_current_profile_name() != "nightly":
    TestPrefixIndex.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
