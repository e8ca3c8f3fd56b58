"""What must hold in every run; each breach has a name. I1 to I7 are those of the protocol's design.

i1 every block, slot and reference is accounted for once     i5 without messages all memory is free in the end
i2 the sums over all states are the pool's size               i6 a fenced message changes nothing
i3 KV that is used or found by its name is the right one      i7 every request ends once, in time, by a known code
i4 each token reaches the client once, in order, and right    besides: write_after_free, read_after_free,
                                                              ended_twice, tenant_hit, no_progress, defect
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner import SimRunner, kv_of

from diptych.kvtransfer.pool import BlockPool, BlockTable
from diptych.kvtransfer.receiver import ReceiverMachine
from diptych.kvtransfer.sender import SenderMachine
from diptych.protos.types import BlockHash

if TYPE_CHECKING:
    from engine import SimEngine

SETTLE_S = 36  # a lease, a quarantine and something
ALLOWED_CODES = frozenset(
    {
        "engine_lost",
        "engine_fault",
        "fenced",
        "peer_lost",
        "overloaded",
        "shutting_down",
        "no_kv_blocks",
        "deadline_exceeded",
        "transfer_failed",
        "transfer_timeout",
        "kv_checksum",
        "request_quarantined",
    }
)


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, name: str, words: str) -> None:
        super().__init__(f"{name}: {words}")
        self.name = name


class SimPool(BlockPool):
    """A BlockPool that checks what is found in it: the KV is that of the prompt, and the tenant's own."""

    def __init__(self, runner: SimRunner, *, num_blocks: int, block_tokens: int) -> None:
        super().__init__(num_blocks=num_blocks, block_tokens=block_tokens, root=b"sim")
        self.runner = runner
        self.asked: dict[tuple[tuple[int, ...], bytes], None] = {}  # every prompt that was looked for
        self._salts: dict[int, bytes] = {}  # by block, of who named it

    def open(self, prompt: Sequence[int], salt: bytes, *, max_cached_tokens: int) -> BlockTable:
        table = super().open(prompt, salt, max_cached_tokens=max_cached_tokens)
        self.asked[tuple(prompt), salt] = None
        table.salt = salt  # type: ignore[attr-defined]
        for block in table.blocks:
            if self._salts.get(block, salt) != salt:
                raise Violation("tenant_hit", f"block {block} holds the prefix of another tenant")
        found = self.runner.read(table.blocks, table.cached_tokens)
        if found != kv_of(tuple(prompt))[: len(found)]:
            raise Violation("i3", f"a block that is found by its name holds something else: {table.blocks}")
        return table

    def _name(self, name: BlockHash, block: int) -> None:
        super()._name(name, block)
        if self._index.find(name) == block:
            self._salts[block] = next(t.salt for t in self._tables if block in t.blocks)  # type: ignore[attr-defined]


def i1_i2(engine: SimEngine) -> None:
    """Blocks of the pool, slots of the ring."""
    try:
        engine.pool.check_integrity()
        if engine.sender is not None:
            engine.sender.check_integrity()
    except AssertionError as wrong:
        raise Violation("i1", f"{engine.name}: {wrong}") from wrong


def i3(engine: SimEngine, blocks: Sequence[int], known: tuple[int, ...]) -> None:
    """A committed transfer brought the right KV to the right places."""
    if engine.runner.read(blocks, len(known)) != kv_of(known):
        raise Violation("i3", f"{engine.name}: a committed transfer left wrong KV in its blocks")


def holds(engine: SimEngine) -> dict[str, int]:
    """What is held, by its name; nothing that is zero."""
    held = {
        "blocks": engine.pool.counts().used,
        "step slots": engine.slots.max_slots - engine.slots.num_free,
        "requests": sum(sum((w.load().running, w.load().waiting)) for w in engine.workers.values()),
        "routes": engine.num_requests,
    }
    if engine.sender is not None:
        held |= {"sends": engine.sender.num_open, "ring slots": engine.sender.ledger.num_busy}
        held["expectations"] = len(engine.sender._early)
    if engine.receiver is not None:
        held |= {"receives": engine.receiver.num_open, "copies": len(engine.arrived)}
    return {what: count for what, count in held.items() if count}


def i5(engine: SimEngine) -> None:
    """Nothing is held."""
    if left := holds(engine):
        raise Violation("i5", f"{engine.name} epoch {engine.ref.epoch} still holds {left}")


def digest(machine: SenderMachine | ReceiverMachine) -> int:
    """Everything that a message could change, but for the counters."""
    names = [name for name in vars(machine) if name not in {"counters", "_history", "_settings", "_layout", "ledger"}]
    state = [repr(getattr(machine, name)) for name in names]
    history = machine._history
    state += [repr(history._ended), repr(history._newest)]
    if isinstance(machine, SenderMachine):
        state.append(repr(machine.ledger.slots))
    return hash(tuple(state))
