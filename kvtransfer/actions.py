"""What the machines ask their drivers to do. A driver does all actions of one input before it gives the next."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.protos.ports import ReceiveEvent, SendEvent
from diptych.protos.types import EngineRef, TransferKey

from .messages import ChunkReady, Link, Message


@dataclass(frozen=True, slots=True)
class Send:
    """Send to the peer of the link; in order. A link that is down swallows it."""

    link: Link
    message: Message


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tell the step thread."""

    event: SendEvent | ReceiveEvent


@dataclass(frozen=True, slots=True)
class Gather:
    """P: pack positions tok_from .. tok_to - 1 into the slot, publish it, then call `gathered` (or `gather_failed`)."""

    key: TransferKey
    chunk: int
    slot: int
    slot_gen: int
    tok_from: int
    tok_to: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Retire:
    """P: write the new generation into the slot's header, before any Gather into it."""

    slot: int
    slot_gen: int


@dataclass(frozen=True, slots=True)
class Dial:
    """D: reach this life of a prefill engine, then call `pair_up` or `pair_failed`.

    `without`: transports that altered bytes; to be taken only where there is no other.
    """

    peer: EngineRef
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the channel of this link; the machine counts it as down already."""

    link: Link


@dataclass(frozen=True, slots=True)
class Fetch:
    """D: copy a chunk to private memory, verify it, then call `fetched`. Writes into no block."""

    link: Link
    ready: ChunkReady


@dataclass(frozen=True, slots=True)
class Scatter:
    """D: unpack the verified bytes of the chunk's last Fetch into the blocks, then call `scattered`.

    `is_last`: the prompt ends with it; clear the rest of its block too.
    """

    ready: ChunkReady
    blocks: tuple[int, ...]
    is_last: bool


SendAction = Send | Deliver | Gather | Retire | HangUp
ReceiveAction = Send | Deliver | Dial | HangUp | Fetch | Scatter
