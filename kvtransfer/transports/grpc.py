"""Any network: the decode engine streams a slot's bytes over a gRPC channel of its own, beside the control channel."""

from __future__ import annotations

import hashlib
import hmac
import os

import grpc

from diptych.protos import kv_pb2 as pb
from diptych.protos import kv_pb2_grpc
from diptych.protos.channels import FETCH_BYTES, MAX_KV_MESSAGE_BYTES, open_blocking_channel
from diptych.protos.errors import PeerLost, TransferError
from diptych.protos.trust import Refusals, Trust
from diptych.protos.types import EngineRef, Role, TransferKey

from ..ring import RingMemory, SlotRef, TornRead
from ..wire import key_from_pb, key_to_pb

_CAPABILITY_BYTES = 16
FRAME_BYTES = 256 * 1024  # best of 64 KiB .. 4 MiB for grpc.aio on two CPU cores


class GrpcOwner:
    """The FetchBytes half of the KvChannel service."""

    def __init__(self, ring: RingMemory, me: EngineRef) -> None:
        self._ring = ring
        self._me = me
        self._closed = False
        self._capability_key = os.urandom(32)  # never leaves this object: capabilities end with the engine
        self.refused = Refusals("the KV byte service")

    def capability(self, key: TransferKey, slot: int, generation: int) -> bytes:
        """The right to fetch what the slot holds in this generation: void once the slot is retired. Thread-safe."""
        words = b"%b %d %d %d" % (key.transfer_id, key.attempt, slot, generation)
        return hmac.new(self._capability_key, words, hashlib.sha256).digest()[:_CAPABILITY_BYTES]

    def invite(self) -> bytes:
        """Nothing to tell: the bytes come from the target of the control channel."""
        return b""

    async def fetch(self, request: pb.FetchRequest, context: grpc.aio.ServicerContext) -> None:
        """Stream the slot that (transfer, attempt, slot, generation) names; FAILED_PRECONDITION when there is none.

        PERMISSION_DENIED without its capability, before any memory is looked at.
        """
        try:
            key = key_from_pb(request.key)
            if not hmac.compare_digest(request.capability, self.capability(key, request.slot, request.slot_gen)):
                self.refused.note(context.peer(), "a fetch without the capability of its slot")
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the slot was not announced to this caller")
            ref = self._find(key, request)
            for at in range(0, ref.size_bytes, FRAME_BYTES):
                await context.write(pb.KvBytes(data=self._ring.frame(ref, at, FRAME_BYTES)))
        except (TornRead, TransferError) as exc:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(exc))
        except ValueError:  # the word of a mapping that was closed meanwhile
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine is going down")

    def close(self) -> None:
        """See RingOwner."""
        self._closed = True

    def _find(self, key: TransferKey, request: pb.FetchRequest) -> SlotRef:
        if self._closed or request.engine_epoch != self._me.epoch or request.slot >= self._ring.num_slots:
            raise TornRead("another life of the engine is meant")
        ref = self._ring.lookup(request.slot)
        if (ref.key, ref.generation) != (key, request.slot_gen) or not ref.size_bytes:
            raise TornRead(f"slot {request.slot} does not hold {key}")
        return ref


class GrpcReader:
    """Fetches slots from `peer`; several threads may read at once. A read ends after `timeout_s` at the latest."""

    inline = False

    def __init__(self, peer: EngineRef, timeout_s: float, trust: Trust) -> None:
        self._peer = peer
        self._trust = trust
        self._timeout_s = timeout_s
        # Its own subchannel: else it would share one connection with control messages and delay them.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", MAX_KV_MESSAGE_BYTES)]
        self._channel = open_blocking_channel(trust, peer.target, role=Role.PREFILL.value, options=options)
        self._stub = kv_pb2_grpc.KvChannelStub(self._channel)  # type: ignore[no-untyped-call]

    def read(self, ref: SlotRef, out: memoryview) -> None:
        """See RingReader."""
        request = pb.FetchRequest(
            key=key_to_pb(ref.key),
            slot=ref.slot,
            slot_gen=ref.generation,
            engine_epoch=self._peer.epoch,
            capability=ref.capability,
        )
        proof = self._trust.proof(FETCH_BYTES, self._peer)
        at = 0
        try:
            for frame in self._stub.FetchBytes(request, timeout=self._timeout_s, metadata=proof):
                end = at + len(frame.data)
                if end > ref.size_bytes:
                    raise TornRead(f"more than {ref.size_bytes} bytes came")
                out[at:end] = frame.data
                at = end
        except grpc.RpcError as exc:
            if exc.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise TornRead(str(exc.details())) from exc
            raise PeerLost(f"the bytes of a chunk did not come: {exc.code().name}") from exc
        except ValueError as exc:  # grpc's word for a channel that this end has closed
            raise PeerLost("the channel is closed") from exc
        if at != ref.size_bytes:
            raise TornRead(f"{at} bytes came, not {ref.size_bytes}")

    def close(self) -> None:
        """See RingReader."""
        self._channel.close()
