"""How two engines agree on a channel: the checks behind Hello and HelloAck. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diptych.protos import kv_pb2 as pb
from diptych.protos.errors import TransferError
from diptych.protos.types import EngineId, EngineRef

from .layout import KvLayout
from .messages import Link
from .wire import layout_from_pb, layout_to_pb

LOCAL, SHM, GRPC = "local", "shm", "grpc"


def offers(setting: str, peer: EngineRef, *, in_process: bool) -> list[str]:
    """The transports that a decode engine asks `peer` for, best first. `setting` is auto, shm or grpc."""
    if setting != "auto":
        return [setting]
    same_host = peer.target.startswith("unix:")
    return [LOCAL] * in_process + [SHM] * same_host + [GRPC]


def supported(setting: str) -> frozenset[str]:
    """The transports that a prefill engine serves."""
    return frozenset((LOCAL, SHM, GRPC)) if setting == "auto" else frozenset((setting,))


def make_hello(
    me: EngineRef, peer: EngineRef, layout: KvLayout, compat: bytes, transports: Sequence[str], pair_epoch: int
) -> pb.KvMsg:
    """The first message of a channel, from the decode engine."""
    hello = pb.Hello(
        engine_id=me.engine_id,
        engine_epoch=me.epoch,
        peer_epoch=peer.epoch,
        compat_sha256=compat,
        compat_text=layout.describe(),
        geometry=layout_to_pb(layout),
        transports=transports,
    )
    return pb.KvMsg(src_epoch=me.epoch, pair_epoch=pair_epoch, hello=hello)


def link_of(msg: pb.KvMsg) -> Link:
    """The link that a Hello asks for, seen from the prefill engine."""
    return Link(EngineId(msg.hello.engine_id), msg.hello.engine_epoch, msg.pair_epoch)


def why_not(
    msg: pb.KvMsg, *, me: EngineRef, layout: KvLayout, compat: bytes, known: Link | None, served: Collection[str]
) -> str | None:
    """Why the prefill engine `me` refuses a Hello, in words, or None. `known` is the engine's present link."""
    hello = msg.hello
    if hello.peer_epoch != me.epoch:
        return f"another life of prefill engine {me.engine_id} is meant"
    if known is not None and (known.epoch, known.pair_epoch) >= (hello.engine_epoch, msg.pair_epoch):
        return f"decode engine {hello.engine_id} has a newer channel already"
    try:
        words = layout.mismatch(layout_from_pb(hello.geometry))
    except TransferError as exc:
        return str(exc)
    if words is not None:
        return f"the KV layouts differ: {words}"
    if hello.compat_sha256 != compat:
        return (
            f"the engines do not serve the same model ({layout.describe()} here, {hello.compat_text} there; "
            "weights, attention settings or protocol differ)"
        )
    if not any(name in served for name in hello.transports):
        return f"no common transport: {', '.join(hello.transports)} wanted, {', '.join(sorted(served))} served"
    return None
