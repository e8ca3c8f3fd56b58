"""How much memory a cluster will take, told before anything starts. The overheads of processes were measured on Linux
x86-64 with torch 2.13 and ray 2.60 (proportional set size); everything else is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from diptych.cluster.engine.spec import EngineSpec
from diptych.kvtransfer.layout import ITEM_BYTES, KvLayout
from diptych.protos.errors import StartupError
from diptych.protos.types import Role

MIB = 1 << 20
ENGINE_PROCESS = 540 * MIB  # interpreter, torch, transformers, Ray's worker, activations of one step
CARD_PROCESS = 3072 * MIB  # with torch's CUDA libraries, the driver's mappings and pinned memory; not measured yet
ROUTER_PROCESS = 150 * MIB
RAY_PROCESSES = 640 * MIB  # head, raylet, agents, Serve's controller and proxy, pool manager
MARGIN = 1.05

# Bytes that new processes may take together with what the processes of these pids hold now, and what sets that bound.
Available = Callable[[Sequence[int]], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One process, in bytes."""

    name: str
    weights: int = 0
    arena: int = 0
    ring: int = 0
    process: int = 0
    kv_key: str = ""  # where the configuration sets its arena

    @property
    def total(self) -> int:
        """Bytes of the row."""
        return self.weights + self.arena + self.ring + self.process


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All rows against what there is."""

    rows: tuple[MemoryRow, ...]
    available: int
    bound: str  # what sets `available`

    @property
    def total(self) -> int:
        """Bytes of all rows."""
        return sum(row.total for row in self.rows)

    def check(self) -> None:
        """Raises StartupError with the numbers and what to change when it does not fit."""
        needed = int(self.total * MARGIN)
        if needed <= self.available:
            return
        largest = max(self.rows, key=lambda row: row.total)
        advice = "serve a smaller model"
        if largest.arena >= largest.weights and largest.kv_key:
            advice = f"lower {largest.kv_key}.memory_mib"
        raise StartupError(
            f"not enough memory: the plan needs {needed // MIB} MiB and {self.bound} is {self.available // MIB} MiB; "
            f"the largest part is {largest.name} with {largest.total // MIB} MiB. To change that {advice}, "
            "use fewer engines, or free memory"
        )

    def table(self) -> str:
        """For people; MiB."""
        head = ("process", "weights", "KV arena", "ring", "overhead", "total")
        lines = [(row.name, row.weights, row.arena, row.ring, row.process, row.total) for row in self.rows]
        body = [(name, *(f"{size / MIB:,.0f}" if size else "-" for size in sizes)) for name, *sizes in lines]
        text = [f"{row[0]:<14}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in (head, *body)]
        text.append(f"{'all':<14}{self.total / MIB:>55,.0f}   of {self.available / MIB:,.0f} MiB ({self.bound})")
        return "\n".join(text)


def plan_memory(engines: Sequence[EngineSpec], available: tuple[int, str], ray_is_ours: bool) -> MemoryPlan:
    """`available` is host.available_memory()."""
    rows = [_engine_row(spec) for spec in engines]
    rows.append(MemoryRow("router", process=ROUTER_PROCESS))
    if ray_is_ours:
        rows.append(MemoryRow("ray", process=RAY_PROCESSES))
    return MemoryPlan(tuple(rows), *available)


def engine_bytes(spec: EngineSpec, *, has_been: Collection[Role] = ()) -> int:
    """What an engine takes that was made for `spec`; `has_been` are the roles that it had since."""
    return _engine_row(spec).total + (ring_bytes(spec) if Role.PREFILL in set(has_been) - spec.roles else 0)


def ring_bytes(spec: EngineSpec) -> int:
    """Of the staging ring: every engine that may prefill has one, and it takes memory once it does."""
    return spec.transfer.slots * spec.transfer.slot_kib * 1024


def check_more(template: EngineSpec, count: int, planned: int, pids: Sequence[int], available: Available) -> None:
    """Whether `count` more engines fit beside those present, which take `planned` bytes. Raises StartupError with the
    numbers.

    The present ones count in full: an arena takes memory as it is used, not when it is made.
    """
    new = _engine_row(template).total
    have, bound = available(pids)
    needed = int((planned + count * new) * MARGIN)
    lower = f"Lower {template.kv_key}.memory_mib, " if template.device == "cpu" else "To change that "
    if needed > have:
        raise StartupError(
            f"not enough memory for {count} more engine{'s' if count > 1 else ''} of {new // MIB} MiB: together with "
            f"the {planned // MIB} MiB of the present ones the plan needs {needed // MIB} MiB, and {bound} with what "
            f"they hold is {have // MIB} MiB. {lower}use fewer engines, or free memory"
        )


def check_ring(template: EngineSpec, planned: int, pids: Sequence[int], available: Available) -> None:
    """Whether one of the engines present, which take `planned` bytes, may begin to use its staging ring. Raises
    StartupError with the numbers.
    """
    ring = ring_bytes(template)
    have, bound = available(pids)
    needed = int((planned + ring) * MARGIN)
    if needed > have:
        raise StartupError(
            f"not enough memory for the staging ring of {ring // MIB} MiB that a prefill engine uses: together with "
            f"the {planned // MIB} MiB of the present engines the plan needs {needed // MIB} MiB, and {bound} with "
            f"what they hold is {have // MIB} MiB. Lower transfer.slots or transfer.slot_kib, use fewer engines, or "
            "free memory"
        )


def _engine_row(spec: EngineSpec) -> MemoryRow:
    """Of the machine's memory: weights and KV of an engine on a card are there, see engine/card_plan.py."""
    facts, ring = spec.facts, ring_bytes(spec) if Role.PREFILL in spec.roles else 0
    if spec.device != "cpu":
        return MemoryRow(spec.engine_id, ring=ring, process=CARD_PROCESS)
    if spec.text is not None:
        weights = facts.num_parameters * ITEM_BYTES[spec.dtype]
        return MemoryRow(spec.engine_id, weights=weights, process=ENGINE_PROCESS)
    layout = KvLayout(
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        dtype=spec.dtype,
        block_tokens=spec.kv.block_tokens,
    )
    return MemoryRow(
        spec.engine_id,
        weights=facts.num_parameters * ITEM_BYTES[spec.dtype],
        arena=spec.num_blocks(layout) * layout.bytes_per_block,
        ring=ring,
        process=ENGINE_PROCESS,
        kv_key=spec.kv_key,
    )
