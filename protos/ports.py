"""Protocols between floors, and the events that travel along them.

Threads of an engine: the step thread owns workers, schedulers and the block pool; the transfer thread owns the transfer
state machines, the ring and the copies; the asyncio thread owns gRPC. They meet in queues only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import DiptychError
from .step import StepPlan, StepResult
from .types import DecodeOrder, EngineRef, PrefillOrder, Role, StepOutput, TransferKey


class Clock(Protocol):
    """Monotonic seconds; tests pass a fake."""

    def __call__(self) -> float:
        """Seconds since some fixed moment."""


class StepCost(Protocol):
    """What a runner knows of its own speed."""

    def seconds(self, *, decode_rows: int, prompt_tokens: int, kv_tokens: int, prompt_kv: int) -> float:
        """Of a step with so many decoding rows, which read `kv_tokens` positions in all, and so many prompt tokens that
        follow `prompt_kv` computed ones. Grows with each of them.
        """


class Runner(Protocol):
    """The device: batch in, tokens out. At most two steps are outstanding.

    A step goes on where those before it, collected or not, left slots and blocks. Where one failed, rows of the next
    that take their token from a slot come back among the faults.
    """

    max_slots: int
    max_step_tokens: int
    vocab_size: int  # ids of prompts are below it
    depth: int  # 1: a step is collected before the next one is planned; 2: when the next one is launched

    cost: StepCost | None  # None: steps are planned as large as they may be

    def max_runs(self, rows: int) -> int:
        """Of a step with so many decoding rows: how many of them had better have several tokens, those that a guide is
        certain of. What a step does not take so is computed token by token.
        """

    def launch(self, plan: StepPlan) -> None:
        """Start a step. Does not wait for the device where it can avoid it. What it raises, it has not launched."""

    def collect(self) -> StepResult:
        """Wait for the oldest step launched and not yet collected. Raises what the step raised."""

    def idle(self) -> bool:
        """Nobody has a request here: do up to 50 ms of what makes later ones faster. False: there is nothing to do."""


# ---- prefill side: step thread -> transfer thread -> step thread ------------------------------


class SendPort(Protocol):
    """The step thread's end of the sender. Calls never block and never raise; a transfer ends in one `Released`."""

    def open(self, key: TransferKey, peer: EngineRef, num_tokens: int) -> None:
        """A transfer of the KV of prompt positions 0 .. num_tokens - 1 begins."""

    def computed(self, key: TransferKey, upto: int, blocks: Sequence[int]) -> None:
        """KV of positions 0 .. upto - 1 is final in `blocks` (in order) and stays untouched until `Released`."""

    def finish(self, key: TransferKey, first_token: int, *, final: bool) -> None:
        """Token 0 is sampled. `final`: it ended the request, so nothing needs to cross."""

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        """Stop. `Released` follows when nothing reads the blocks any more.

        For a key that was never opened the peer is told, and no `Released` follows; ended keys are ignored.
        """


@dataclass(frozen=True, slots=True)
class Released:
    """The sender no longer reads the blocks. `error` is None when the peer owns a verified copy (or needed none)."""

    key: TransferKey
    error: DiptychError | None
    size_bytes: int = 0
    seconds: float = 0.0
    transport: str = ""


# ---- decode side ------------------------------------------------------------------------------


class ReceivePort(Protocol):
    """The step thread's end of the receiver. Each `expect` ends in exactly one of Committed, Failed, Closed."""

    def expect(self, key: TransferKey, peer: EngineRef, num_tokens: int, have_tokens: int) -> None:
        """KV of prompt positions have_tokens .. num_tokens - 1 will come from `peer`; the rest is cached here."""

    def grant(self, key: TransferKey, blocks: Sequence[int]) -> None:
        """Answer to `WantBlocks`: the blocks of positions 0 .. num_tokens - 1, in order, owned by this request."""

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        """Stop; unknown or ended keys are ignored. `Closed` follows when nothing writes into the blocks any more."""


@dataclass(frozen=True, slots=True)
class WantBlocks:
    """The first chunk is announced: grant all blocks of the prompt, at once or later."""

    key: TransferKey


@dataclass(frozen=True, slots=True)
class Committed:
    """All chunks are in the granted blocks, checked. Generation goes on after `first_token`.

    `final`: token 0 ended the request; no blocks were asked for.
    """

    key: TransferKey
    first_token: int
    final: bool
    size_bytes: int = 0
    seconds: float = 0.0
    transport: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The transfer ended without a usable copy; the granted blocks hold nothing of worth and nobody writes to them."""

    key: TransferKey
    error: DiptychError


@dataclass(frozen=True, slots=True)
class Closed:
    """The abort that the step thread asked for is complete."""

    key: TransferKey


SendEvent = Released
ReceiveEvent = WantBlocks | Committed | Failed | Closed
Emit = Callable[[StepOutput], None]  # from the step thread to the sessions; never blocks


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker has in hand."""

    running: int
    waiting: int


class Worker(Protocol):
    """One role's work in an engine, driven by the engine's step loop; all calls come from the step thread.

    Every order ends in exactly one `Finish` with that worker's role, through `Emit`; it gives back its blocks and slot
    then, or as soon as no transfer touches them. Errors end requests, never the worker.
    """

    role: Role

    def submit(self, order: PrefillOrder | DecodeOrder) -> None:
        """Take an order of this worker's role. A full queue or an impossible request ends at once in a `Finish`."""

    def cancel(self, key: TransferKey) -> None:
        """End a request; unknown and ended keys are ignored."""

    def on_transfer(self, event: SendEvent | ReceiveEvent) -> None:
        """An event of this worker's end of the hinge."""

    def step(self) -> bool:
        """Plan and launch at most one step, collect and emit what is due. False: nothing to run, nothing under way."""

    def next_wake(self) -> float | None:
        """Clock time at which `step` should be called again though no event came (deadlines), or None."""

    def load(self) -> WorkerLoad:
        """Requests running and waiting."""

    def counters(self) -> dict[str, float]:
        """By metric name, which begins with the role. Totals since the start end in _total; others are as of now."""
