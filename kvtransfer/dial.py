"""How a decode engine reaches a prefill engine: dial with backoff, say Hello, attach to the ring or step down."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import grpc

from diptych.protos import kv_pb2 as pb
from diptych.protos import kv_pb2_grpc
from diptych.protos.channels import KV_SESSION, MAX_KV_MESSAGE_BYTES, open_channel
from diptych.protos.errors import LayoutMismatch, PeerLost, TransferError
from diptych.protos.faults import FaultPlan
from diptych.protos.settings import TransferSettings
from diptych.protos.trust import Trust
from diptych.protos.types import EngineRef, Role

from . import pairing, probe
from .channel import Channel
from .faults import FaultyReader, dialing, make_channel
from .layout import KvLayout
from .transports import local
from .transports.base import RingReader
from .transports.grpc import GrpcReader
from .transports.local import LocalReader
from .transports.shm import ShmReader

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 1.0
# Dialing again is ours, on a channel of its own each time. gRPC's pauses between connections are left as they are: a
# short one also cuts the wait for a process that is stopped, and its silence would look like nobody listening.
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_KV_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
]
# Answers that no further try would change.
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass(frozen=True, slots=True)
class Agreement:
    """A channel that both ends agreed on, with the ring attached. `close` ends it."""

    pair_epoch: int
    transport: str
    reader: RingReader
    channel: Channel
    read: Callable[[], Awaitable[pb.KvMsg | None]]
    write: Callable[[pb.KvMsg], Awaitable[None]]
    close: Callable[[], Awaitable[None]]


class _NoRing(Exception):
    """The chosen transport could not be attached, or brings other bytes, or is slow and there are others."""


class Dialer:
    """Asyncio thread only. `num_downgrades` counts transports that were agreed on and left: `num_failed_probes` of them
    because they altered bytes or were slow. `probed_mib_s` is what the last one brought that was taken.
    """

    def __init__(
        self,
        *,
        me: EngineRef,
        layout: KvLayout,
        compat: bytes,
        settings: TransferSettings,
        trust: Trust,
        faults: FaultPlan | None = None,
    ) -> None:
        self.num_downgrades = 0
        self.num_failed_probes = 0
        self.probed_mib_s = 0.0
        self._trust = trust
        self._me = me
        self._layout = layout
        self._compat = compat
        self._settings = settings
        self._faults = faults
        self._pair_epoch = 0

    async def connect(self, peer: EngineRef, without: Collection[str] = ()) -> Agreement:
        """Reach that life of a prefill engine within dial_timeout_s, `without` some transports where it serves others.

        Raises PeerLost when it cannot be reached in time, takes the call and says nothing for silence_s, lives another
        life or does not take our proof, LayoutMismatch when it refuses: none of these is tried again. StartupError when
        the way there is not allowed.
        """
        offered = pairing.offers(self._settings.transport, peer, in_process=local.is_here(peer))
        failed = set(without)
        if self._faults is not None:
            await dialing(self._faults, peer.engine_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.dial_timeout_s
        backoff_s = _FIRST_BACKOFF_S
        reason = "no answer"
        while (left := deadline - loop.time()) > 0:
            try:
                return await asyncio.wait_for(self._try(peer, offered, failed), min(left, self._settings.silence_s))
            except _NoRing as exc:
                name = str(exc.args[0])
                self.num_downgrades += 1
                log.warning("prefill engine %s: transport %s failed: %s", peer.engine_id, name, exc.__cause__)
                if name in failed or failed.issuperset(other for other in offered if other != name):
                    raise PeerLost(f"no transport to prefill engine {peer.engine_id} works") from exc
                failed.add(name)
                continue
            except (grpc.RpcError, asyncio.InvalidStateError) as exc:  # the latter from a write to a call that ended
                reason = str(exc.details() if isinstance(exc, grpc.aio.AioRpcError) else exc)
            except TimeoutError:
                # A port that nobody listens on says so at once. Who is silent hangs: a stopped process takes calls.
                reason = "it does not answer"
                break
            await asyncio.sleep(min(backoff_s * random.uniform(0.8, 1.2), max(deadline - loop.time(), 0.0)))
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        raise PeerLost(f"prefill engine {peer.engine_id} cannot be reached", detail=reason)

    async def _try(self, peer: EngineRef, offered: list[str], failed: set[str]) -> Agreement:
        # Those that failed are offered still, behind the others: the peer, which takes the first that it serves, may
        # have nothing else. Who leaves them out is refused, and that for ever.
        transports = sorted(offered, key=lambda name: name in failed)
        self._pair_epoch += 1
        pair_epoch = self._pair_epoch
        conn = open_channel(self._trust, peer.target, role=Role.PREFILL.value, options=_CHANNEL_OPTIONS)
        reader: RingReader | None = None
        try:
            stub = kv_pb2_grpc.KvChannelStub(conn)  # type: ignore[no-untyped-call]
            call = stub.Session(metadata=self._trust.proof(KV_SESSION, peer))
            await call.write(
                pairing.make_hello(self._me, peer, self._layout, self._compat, transports, pair_epoch),
            )
            answer = await call.read()
            if answer is grpc.aio.EOF:
                details = str(await call.details())
                if await call.code() in _FINAL:
                    raise PeerLost(f"prefill engine {peer.engine_id} does not trust this engine", detail=details)
                # A server that is not ready yet answers so too: the details come with the status.
                raise grpc.RpcError(details)
            ack = answer.hello_ack
            if ack.engine_epoch != peer.epoch:
                raise PeerLost(f"prefill engine {peer.engine_id} has been restarted")
            if ack.refusal:
                raise LayoutMismatch(f"prefill engine {peer.engine_id} refuses the pair: {ack.refusal}")
            if ack.transport not in transports:
                raise LayoutMismatch(f"prefill engine {peer.engine_id} chose a transport that it was not offered")
            reader = await self._attach(peer, ack)
            if self._faults is not None:
                reader = FaultyReader(reader, self._faults, peer.engine_id)
            left = transports[transports.index(ack.transport) + 1 :]
            await self._probe(reader, ack, is_last=failed.issuperset(left))
        except BaseException:
            if reader is not None:
                reader.close()
            await conn.close()
            raise

        async def read() -> pb.KvMsg | None:
            msg = await call.read()
            return None if msg is grpc.aio.EOF else msg

        async def close() -> None:
            await conn.close()

        channel = make_channel(self._faults, peer.engine_id, src_epoch=self._me.epoch, pair_epoch=pair_epoch)
        return Agreement(pair_epoch, ack.transport, reader, channel, read, call.write, close)

    async def _probe(self, reader: RingReader, ack: pb.HelloAck, *, is_last: bool) -> None:
        ref = probe.reference(ack.engine_epoch, ack.slots, ack.slot_bytes, ack.probe_capability)
        least = self._settings.min_mib_s
        try:
            speed = await asyncio.to_thread(probe.measure, reader, ref, least)
            if speed < least and not is_last:
                raise PeerLost(f"{speed:.0f} MiB/s, less than {least:g}")
        except TransferError as exc:
            self.num_failed_probes += 1
            raise _NoRing(ack.transport) from exc
        self.probed_mib_s = speed

    async def _attach(self, peer: EngineRef, ack: pb.HelloAck) -> RingReader:
        try:
            if ack.transport == pairing.LOCAL:
                return LocalReader(peer)
            if ack.transport == pairing.SHM:
                return await asyncio.to_thread(ShmReader, ack.blob, ack.slots, ack.slot_bytes)
            return GrpcReader(peer, self._settings.fetch_timeout_s, self._trust)
        except PeerLost as exc:
            raise _NoRing(ack.transport) from exc
