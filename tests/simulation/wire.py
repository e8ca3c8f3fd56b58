"""Frames between router and engine, as values: engine.proto without protobuf."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.protos.status import EngineStatus
from diptych.protos.types import DecodeOrder, Finish, PrefillOrder, TransferKey


@dataclass(frozen=True, slots=True)
class Open:
    epoch: int


@dataclass(frozen=True, slots=True)
class Welcome:
    prefix_root: bytes
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Submit:
    handle: int
    order: PrefillOrder | DecodeOrder


@dataclass(frozen=True, slots=True)
class Cancel:
    key: TransferKey


@dataclass(frozen=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True)
class Bye:
    """The engine ends the stream by its own will, with words that say why or as a defect would."""

    has_reason: bool = True


@dataclass(frozen=True, slots=True)
class Tokens:
    rows: tuple[tuple[int, int, int], ...]  # handle, index, token
    ends: tuple[tuple[int, Finish], ...]  # handle, the end


@dataclass(frozen=True, slots=True)
class Status:
    status: EngineStatus


@dataclass(frozen=True, slots=True)
class Names:
    reset: bool
    added: tuple[int, ...]
    removed: tuple[int, ...]
