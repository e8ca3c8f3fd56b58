"""Hypothesis against the block pool: any order of its calls keeps every block in one state and every prefix its own."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from diptych.kvtransfer.pool import BlockPool, BlockTable
from diptych.kvtransfer.prefix import short_name

BLOCK_TOKENS = 3
SALTS = (b"", b"a", b"b")
prompts = st.lists(st.integers(0, 1), min_size=0, max_size=14)


class Request:
    """A table and what its owner knows of it."""

    def __init__(self, table: BlockTable, salt: bytes, tokens: list[int]) -> None:
        self.table = table
        self.salt = salt
        self.tokens = tokens
        self.valid = table.cached_tokens  # positions whose KV is in place
        self.may_extend = True


class PoolMachine(RuleBasedStateMachine):
    """`content` is what lies in the memory of each block: the prefix up to and with its last token, and its salt."""

    requests = Bundle("requests")

    @initialize(num_blocks=st.integers(1, 9), prefix_cache=st.booleans())
    def begin(self, num_blocks: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, root=b"r", prefix_cache=prefix_cache)
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.open: list[Request] = []
        self.journal = self.pool.watch_names()
        self.told: set[int] = set()

    @rule(target=requests, prompt=prompts, salt=st.sampled_from(SALTS), limit=st.integers(0, 14))
    def open_table(self, prompt: list[int], salt: bytes, limit: int) -> Request:
        table = self.pool.open(prompt, salt, max_cached_tokens=limit)
        request = Request(table, salt, list(prompt))
        assert table.cached_tokens <= min(limit, len(prompt))
        assert self.pool.prefix_cache or not table.cached_tokens
        self.open.append(request)
        return request

    @rule(request=requests, more=prompts)
    def grow(self, request: Request, more: list[int]) -> None:
        before = list(request.table.blocks)
        wanted = len(request.tokens) + len(more)
        held = self.pool.counts()
        done = request.table.try_grow(wanted)
        missing = max(0, -(-wanted // BLOCK_TOKENS) - len(before))
        assert done == (missing <= held.free + held.cached), "all or nothing, and nothing only for want of room"
        assert request.table.blocks[: len(before)] == before
        if not done:
            assert request.table.blocks == before
            assert self.pool.counts() == held
            return
        for block in request.table.blocks[len(before) :]:
            assert all(block not in other.table.blocks for other in self.open if other is not request)
            self.content.pop(block, None)  # taken for something new
        request.tokens += more

    @rule(request=requests, part=st.floats(0, 1))
    def compute_and_commit(self, request: Request, part: float) -> None:
        room = min(len(request.tokens), len(request.table.blocks) * BLOCK_TOKENS)
        upto = request.valid + int(part * (room - request.valid)) if room > request.valid else request.valid
        if upto > room:
            return
        for at in range(request.valid // BLOCK_TOKENS, upto // BLOCK_TOKENS):
            block = request.table.blocks[at]
            self.content[block] = (request.salt, tuple(request.tokens[: (at + 1) * BLOCK_TOKENS]))
        request.valid = upto
        request.table.commit(request.tokens, upto)

    @rule(request=requests, part=st.floats(0, 1))
    def foresee(self, request: Request, part: float) -> None:
        request.table.foresee(request.tokens, int(part * len(request.tokens)))

    @rule(request=requests)
    def extend_prefix(self, request: Request) -> None:
        valid = request.table.extend_prefix(request.tokens, request.valid, max_cached_tokens=len(request.tokens))
        assert valid >= request.valid
        request.valid = valid

    @rule(request=consumes(requests))
    def close(self, request: Request) -> None:
        request.table.close()
        request.table.close()  # idempotent
        assert not request.table.blocks
        self.open.remove(request)

    @rule()
    def drop_cache(self) -> None:
        self.pool.drop_cache()
        assert self.pool.counts().cached == 0

    @rule()
    def read_journal(self) -> None:
        change = self.journal.drain()
        if change is not None:
            kept = set() if change.reset else self.told - set(change.removed)
            self.told = kept | set(change.added)
        assert self.told == {short_name(name) for name in self.pool._index.names()}

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            counts = self.pool.counts()
            assert counts.free + counts.cached + counts.used == counts.total
            assert counts.used == len({block for request in self.open for block in request.table.blocks})

    @invariant()
    def what_is_valid_holds_its_own_prefix(self) -> None:
        """Also after others were evicted, shared, named twice: no tenant sees another's."""
        for request in getattr(self, "open", ()):
            for at in range(request.valid // BLOCK_TOKENS):
                prefix = tuple(request.tokens[: (at + 1) * BLOCK_TOKENS])
                assert self.content.get(request.table.blocks[at]) == (request.salt, prefix)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for request in self.open:
                request.table.close()
            self.pool.drop_cache()
            assert self.pool.counts().free == self.pool.num_blocks


TestPool = PoolMachine.TestCase
if settings.get_current_profile_name() != "nightly":
    TestPool.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
