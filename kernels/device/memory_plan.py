"""How a card's memory is divided: told before anything is allocated, and again once the largest step has run.

KV gets what is left. Arithmetic alone: nothing here touches a device. Called where an engine is composed.
"""

from __future__ import annotations

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
    def num_blocks(self) -> int:
        """KV blocks of the plan, the spare one not counted; at most what is wanted. May be negative: see `check`."""
        room = (self.free - self.used) // self.bytes_per_block - 1
        return room if self.wanted_kv is None else min(room, self.wanted_kv // self.bytes_per_block)

    def check(self, *, least_tokens: int) -> None:
        """StartupError, with what is missing and what would fit, where KV of `least_tokens` or of the configured size
        does not.
        """
        wanted = least_tokens * self.bytes_per_block // self.block_tokens + self.bytes_per_block
        if self.wanted_kv is not None:
            wanted = max(wanted, self.wanted_kv // self.bytes_per_block * self.bytes_per_block)
        missing = self.used + wanted + self.bytes_per_block - self.free
        if missing <= 0:
            return
        room = max(
            0, self.num_blocks if self.wanted_kv is None else (self.free - self.used) // self.bytes_per_block - 1
        )
        if room > 0:
            advice = f"KV of {room * self.block_tokens:,} tokens ({_gib(room * self.bytes_per_block)}) would fit"
        else:
            advice = "no KV at all would fit: choose a smaller model, or lower step_tokens and max_running"
        raise StartupError(
            f"The model does not fit on the card: {_gib(missing)} are missing. {_gib(self.used)} are needed beside KV, "
            f"{_gib(wanted)} for KV of {wanted // self.bytes_per_block * self.block_tokens:,} tokens, and "
            f"{_gib(self.free)} are free; {advice}.\n{self.table()}"
        )

    def table(self) -> str:
        """For people; GiB."""
        kv = max(0, self.num_blocks)
        lines = [*self.rows, (f"KV of {kv * self.block_tokens:,} tokens", (kv + 1) * self.bytes_per_block)]
        body = [f"{name:<36}{size / GIB:>10.2f}" for name, size in lines]
        total = sum(size for _, size in lines)
        return "\n".join(
            ["memory plan of the card (GiB)", *body, f"{'all':<36}{total / GIB:>10.2f}   of {self.free / GIB:.2f}"]
        )


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
