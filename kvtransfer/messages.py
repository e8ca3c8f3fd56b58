"""What the two machines say to each other. Wire form: wire.py.

Every message is idempotent and keyed; see the table in README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from diptych.protos.types import EngineId, TransferKey


@dataclass(frozen=True, slots=True)
class Link:
    """One life of the channel between a prefill and a decode engine, named by the peer's life and the pair's."""

    engine_id: EngineId  # of the peer
    epoch: int  # of the peer
    pair_epoch: int  # minted by the decode engine, grows


class ChunkStatus(IntEnum):
    """What became of a fetched chunk; the values are those of kv.proto."""

    OK = 0
    CHECKSUM = 1
    TORN = 2


@dataclass(frozen=True, slots=True)
class Expect:
    """D to P: send the KV of this transfer, from position `have_tokens` on."""

    key: TransferKey
    have_tokens: int


@dataclass(frozen=True, slots=True)
class ChunkReady:
    """P to D: positions tok_from .. tok_to - 1 lie in a slot."""

    key: TransferKey
    chunk: int
    tok_from: int
    tok_to: int
    slot: int
    slot_gen: int
    size_bytes: int
    checksum: int
    capability: bytes = field(default=b"", repr=False)  # stamped by the sending driver: the right to fetch this slot


@dataclass(frozen=True, slots=True)
class ChunkAck:
    """D to P: OK gives the slot back; any other status tells of one more try on the same slot."""

    key: TransferKey
    chunk: int
    slot: int
    slot_gen: int
    status: ChunkStatus


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """P to D: all chunks are announced, token 0 is sampled. `final`: it ended the request, nothing else counts."""

    key: TransferKey
    total_chunks: int
    prompt_tokens: int
    first_token: int
    final: bool


@dataclass(frozen=True, slots=True)
class FinalAck:
    """D to P: verified and committed; P may forget the transfer."""

    key: TransferKey


@dataclass(frozen=True, slots=True)
class Abort:
    """Either way: this transfer has ended here, with this error."""

    key: TransferKey
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class AbortAck:
    """Answer to Abort: nothing of this transfer is read or written here any more."""

    key: TransferKey


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """D to P: these transfers are alive here, renew their leases. P answers with those that are alive there."""

    alive: tuple[TransferKey, ...]


Message = Expect | ChunkReady | ChunkAck | PrefillFinished | FinalAck | Abort | AbortAck | Heartbeat
