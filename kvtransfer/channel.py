"""One control channel of a pair in the asyncio thread, the same at both ends: envelopes, an outbox, a reader.

The outbox is bounded: a peer that does not read loses the channel, and with it its transfers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from diptych.protos import kv_pb2 as pb

from .messages import Link, Message
from .wire import to_pb

log = logging.getLogger(__name__)

OUTBOX_MESSAGES = 4096


class Channel:
    """Asyncio thread only, `close` included."""

    def __init__(self, *, src_epoch: int, pair_epoch: int) -> None:
        self._src_epoch = src_epoch
        self._pair_epoch = pair_epoch
        self._seq = 0
        self._outbox: asyncio.Queue[Message] = asyncio.Queue(OUTBOX_MESSAGES)
        self._closing = asyncio.Event()

    def send(self, message: Message) -> None:
        """Put into the outbox; a full one closes the channel."""
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("a peer does not read its %d messages: closing the channel", OUTBOX_MESSAGES)
            self.close()

    def close(self) -> None:
        """Make `run` return."""
        self._closing.set()

    async def run(
        self,
        *,
        read: Callable[[], Awaitable[pb.KvMsg | None]],
        write: Callable[[pb.KvMsg], Awaitable[None]],
        on_message: Callable[[pb.KvMsg], None],
    ) -> None:
        """Move messages both ways until the peer ends the stream (`read` gives None), it breaks or `close` is called.

        Raises what `read` and `write` raise.
        """

        async def pull() -> None:
            while (msg := await read()) is not None:
                on_message(msg)

        async def push() -> None:
            while True:
                envelope = to_pb(await self._outbox.get())
                self._seq += 1
                envelope.src_epoch, envelope.pair_epoch, envelope.seq = self._src_epoch, self._pair_epoch, self._seq
                await write(envelope)

        tasks = [asyncio.ensure_future(work) for work in (pull(), push(), self._closing.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Outboxes:
    """How the transfer thread reaches the channels of the asyncio thread. `loop` is set before the first `send`."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._channels: dict[Link, Channel] = {}  # asyncio thread

    def add(self, link: Link, channel: Channel) -> None:
        """Asyncio thread: messages for the link go here."""
        self._channels[link] = channel

    def remove(self, link: Link) -> None:
        """Asyncio thread: messages for the link are dropped from now on."""
        self._channels.pop(link, None)

    def send(self, link: Link, message: Message) -> None:
        """Any thread; never blocks. A link that is down swallows it."""
        self.call(lambda: self._send(link, message))

    def close(self, link: Link) -> None:
        """Any thread."""
        self.call(lambda: self._close([link]))

    def close_all(self) -> None:
        """Any thread."""
        self.call(lambda: self._close(list(self._channels)))

    def _send(self, link: Link, message: Message) -> None:
        channel = self._channels.get(link)
        if channel is not None:
            channel.send(message)

    def _close(self, links: list[Link]) -> None:
        for link in links:
            channel = self._channels.get(link)
            if channel is not None:
                channel.close()

    def call(self, job: Callable[[], None]) -> None:
        """Any thread: run `job` on the loop; dropped when the loop is closed."""
        if self.loop is None:
            return
        try:
            self.loop.call_soon_threadsafe(job)
        except RuntimeError:
            pass  # the loop is closed: the engine is going down, and every channel with it
