"""What a transport is: an owner's end beside the ring and a reader's end beside the peer's arena."""

from __future__ import annotations

from typing import Protocol

from ..ring import SlotRef


class RingOwner(Protocol):
    """The prefill engine's end. Thread-safe."""

    def invite(self) -> bytes:
        """What one peer needs to attach: goes into HelloAck.blob. Good for one attachment."""

    def close(self) -> None:
        """Serve nobody any more. Idempotent."""


class RingReader(Protocol):
    """The decode engine's end, for one link."""

    inline: bool  # True: `read` runs at memory speed and never waits for the peer; call it on the transfer thread

    def read(self, ref: SlotRef, out: memoryview) -> None:
        """Copy the chunk into `out`, private memory of ref.size_bytes.

        Raises TornRead when the slot does not hold that chunk (any more), TransferError when the peer cannot be
        reached. `out` is worthless then. The checksum is the caller's to check.
        """

    def close(self) -> None:
        """Give up the ring; a `read` under way ends soon. Idempotent."""
