"""Between the dataclasses of messages.py and kv.proto, both ways. `from_pb` raises TransferError on nonsense."""

from __future__ import annotations

from diptych.protos import kv_pb2 as pb
from diptych.protos.errors import TransferError
from diptych.protos.types import TransferKey

from .layout import KvLayout
from .messages import (
    Abort,
    AbortAck,
    ChunkAck,
    ChunkReady,
    ChunkStatus,
    Expect,
    FinalAck,
    Heartbeat,
    Message,
    PrefillFinished,
)


def key_to_pb(key: TransferKey) -> pb.TransferKey:
    """A key on the wire."""
    return pb.TransferKey(transfer_id=key.transfer_id, attempt=key.attempt)


def key_from_pb(msg: pb.TransferKey) -> TransferKey:
    """A key off the wire."""
    if len(msg.transfer_id) != 16:
        raise TransferError(f"a transfer id of {len(msg.transfer_id)} bytes, not 16")
    return TransferKey(msg.transfer_id, msg.attempt)


def layout_to_pb(layout: KvLayout) -> pb.Geometry:
    """A layout on the wire."""
    return pb.Geometry(
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        dtype=layout.dtype,
    )


def layout_from_pb(msg: pb.Geometry) -> KvLayout:
    """A layout off the wire."""
    try:
        return KvLayout(
            layers=msg.layers,
            kv_heads=msg.kv_heads,
            head_dim=msg.head_dim,
            dtype=msg.dtype,
            block_tokens=msg.block_tokens,
        )
    except ValueError as exc:
        raise TransferError(f"the peer's KV geometry makes no sense: {exc}") from exc


def to_pb(message: Message) -> pb.KvMsg:
    """The message without its envelope: epochs and sequence number are the channel's."""
    match message:
        case Heartbeat(alive):
            return pb.KvMsg(heartbeat=pb.Heartbeat(alive=[key_to_pb(key) for key in alive]))
        case Expect(key, have):
            return pb.KvMsg(expect=pb.Expect(key=key_to_pb(key), have_tokens=have))
        case ChunkReady(key, chunk, tok_from, tok_to, slot, slot_gen, size_bytes, checksum, capability):
            ready = pb.ChunkReady(key=key_to_pb(key), chunk=chunk, tok_from=tok_from, tok_to=tok_to, slot=slot)
            ready.slot_gen, ready.size_bytes, ready.checksum = slot_gen, size_bytes, checksum
            ready.capability = capability
            return pb.KvMsg(ready=ready)
        case ChunkAck(key, chunk, slot, slot_gen, status):
            name = f"CHUNK_{status.name}"
            return pb.KvMsg(ack=pb.ChunkAck(key=key_to_pb(key), chunk=chunk, slot=slot, slot_gen=slot_gen, status=name))
        case PrefillFinished(key, total_chunks, prompt_tokens, first_token, final):
            finished = pb.PrefillFinished(key=key_to_pb(key), total_chunks=total_chunks, prompt_tokens=prompt_tokens)
            finished.first_token, finished.final = first_token, final
            return pb.KvMsg(finished=finished)
        case FinalAck(key):
            return pb.KvMsg(final_ack=pb.FinalAck(key=key_to_pb(key)))
        case Abort(key, code, text):
            return pb.KvMsg(abort=pb.Abort(key=key_to_pb(key), code=code, message=text))
        case AbortAck(key):
            return pb.KvMsg(abort_ack=pb.AbortAck(key=key_to_pb(key)))


def from_pb(msg: pb.KvMsg) -> Message:
    """The message inside an envelope. Hello and HelloAck are not among them: they make the channel."""
    match msg.WhichOneof("msg"):
        case "heartbeat":
            return Heartbeat(tuple(key_from_pb(key) for key in msg.heartbeat.alive))
        case "expect":
            return Expect(key_from_pb(msg.expect.key), msg.expect.have_tokens)
        case "ready":
            ready = msg.ready
            return ChunkReady(
                key_from_pb(ready.key),
                ready.chunk,
                ready.tok_from,
                ready.tok_to,
                ready.slot,
                ready.slot_gen,
                ready.size_bytes,
                ready.checksum,
                ready.capability,
            )
        case "ack":
            ack = msg.ack
            try:
                status = ChunkStatus(ack.status)
            except ValueError as exc:
                raise TransferError(f"unknown chunk status {ack.status}") from exc
            return ChunkAck(key_from_pb(ack.key), ack.chunk, ack.slot, ack.slot_gen, status)
        case "finished":
            done = msg.finished
            key = key_from_pb(done.key)
            return PrefillFinished(key, done.total_chunks, done.prompt_tokens, done.first_token, done.final)
        case "final_ack":
            return FinalAck(key_from_pb(msg.final_ack.key))
        case "abort":
            return Abort(key_from_pb(msg.abort.key), msg.abort.code, msg.abort.message)
        case "abort_ack":
            return AbortAck(key_from_pb(msg.abort_ack.key))
        case other:
            raise TransferError(f"a {other or 'empty'} message inside a running session")
