"""How a card's memory is divided: told before anything is allocated, and again once the largest step has run.

KV gets what is left. Arithmetic alone, and no torch: `diptych serve` asks before it starts a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diptych.protos.errors import StartupError

GIB = 1 << 30
# Of one H200 with torch 2.11: what a process holds before its first tensor is counted in what is free already.
WORKSPACES = 96 << 20  # cuBLAS's, of the two streams that use it
GRAPHS = 192 << 20  # of all sizes together: kernels' arguments, and activations that the sizes share
RESERVE = 1 << 30  # never planned: what the allocator rounds up, libraries that load late, NCCL


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One engine's memory on its card, in bytes."""

    rows: tuple[tuple[str, int], ...]
    free: int  # what the process may take of the card
    bytes_per_block: int
    block_tokens: int
    wanted_kv: int | None  # bytes that the configuration asks for; None: what is left

    @property
    def used(self) -> int:
        """Beside KV."""
        return sum(size for _, size in self.rows)

    @property
    def room(self) -> int:
        """KV blocks that there is memory for, the spare one not counted. Negative: not even for the rest."""
        return (self.free - self.used) // self.bytes_per_block - 1

    @property
    def num_blocks(self) -> int:
        """KV blocks of the plan: `room`, at most what is wanted."""
        return self.room if self.wanted_kv is None else min(self.room, self.wanted_kv // self.bytes_per_block)

    def missing(self, least_tokens: int) -> int:
        """Bytes; 0 or less: KV of `least_tokens`, or of the configured size where that is more, fits."""
        return self.used + self._least_kv(least_tokens) + self.bytes_per_block - self.free

    def refusal(self, least_tokens: int, would_fit: Sequence[str]) -> StartupError:
        """What is missing for KV of `least_tokens`, or of the configured size, and what would fit."""
        wanted = self._least_kv(least_tokens)
        advice = f"would fit: {', or '.join(would_fit)}" if would_fit else "choose a smaller model"
        return StartupError(
            f"The model does not fit on the card: {_gib(self.missing(least_tokens))} are missing. {_gib(self.used)} "
            f"are needed beside KV, {_gib(wanted)} for KV of {wanted // self.bytes_per_block * self.block_tokens:,} "
            f"tokens, and {_gib(self.free)} are free; {advice}.\n{self.table()}"
        )

    def told(self, blocks: int) -> str:
        """So much KV, for people."""
        return f"KV of {blocks * self.block_tokens:,} tokens, {_gib(blocks * self.bytes_per_block)}"

    def table(self, whose: str = "the card") -> str:
        """For people; GiB."""
        kv = max(0, self.num_blocks)
        lines = [*self.rows, (f"KV of {kv * self.block_tokens:,} tokens", (kv + 1) * self.bytes_per_block)]
        body = [f"{name:<36}{size / GIB:>10.2f}" for name, size in lines]
        total = sum(size for _, size in lines)
        return "\n".join(
            [f"memory plan of {whose} (GiB)", *body, f"{'all':<36}{total / GIB:>10.2f}   of {self.free / GIB:.2f}"]
        )

    def _least_kv(self, least_tokens: int) -> int:
        least = least_tokens * self.bytes_per_block // self.block_tokens + self.bytes_per_block
        return max(least, (self.wanted_kv or 0) // self.bytes_per_block * self.bytes_per_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNeeds:
    """What a largest step's memory follows from. `widest`: numbers of one token that live at once, over all buffers."""

    step_tokens: int
    max_rows: int
    vocab_size: int
    widest: int
    item_bytes: int

    @property
    def activations(self) -> int:
        """Buffers and what ops take beside them."""
        return self.step_tokens * self.widest * self.item_bytes

    @property
    def logits(self) -> int:
        """Of every row, and float32 copies of them while tokens are chosen."""
        return self.max_rows * self.vocab_size * (self.item_bytes + 4)


def plan_before_loading(
    weights: int, state: int, *, needs: StepNeeds, free: int, block: tuple[int, int], wanted_kv: int | None
) -> DevicePlan:
    """`weights` and `state` in bytes; `block`: bytes and tokens of a KV block."""
    rows = (
        ("weights", weights),
        (f"steps of {needs.step_tokens:,} tokens", needs.activations),
        (f"logits of {needs.max_rows:,} rows", needs.logits),
        ("state of sequences", state),
        ("graphs and workspaces", GRAPHS + WORKSPACES),
        ("reserve", RESERVE),
    )
    return DevicePlan(rows, free, *block, wanted_kv)


def plan_after_loading(
    weights: int, steps: int, *, free: int, block: tuple[int, int], wanted_kv: int | None
) -> DevicePlan:
    """`steps`: what the largest step took beside the weights, measured; `free`: before either was there."""
    rows = (("weights", weights), ("steps, logits, state", steps), ("graphs", GRAPHS), ("reserve", RESERVE))
    return DevicePlan(rows, free, *block, wanted_kv)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
