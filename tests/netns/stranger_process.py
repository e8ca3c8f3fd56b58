"""What an attacker in the cluster's network tries, from a namespace of its own. One JSON object in, a list of results
out: what, words, seconds, and how many messages and bytes of the engine's came back.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from diptych.protos import engine_pb2, kv_pb2
from diptych.protos.channels import FETCH_BYTES, KV_SESSION, SESSION
from diptych.protos.trust import Trust
from diptych.protos.types import EngineId, EngineRef

PATIENCE_S = 5.0


@dataclasses.dataclass
class Result:
    what: str
    method: str
    words: str
    seconds: float
    messages: int = 0
    num_bytes: int = 0


def main() -> None:
    order = json.loads(sys.stdin.read())
    ref = EngineRef(EngineId(order["engine_id"]), order["epoch"], order["target"])
    results = [
        _call(what, method, ref, order)
        for method in (KV_SESSION, SESSION, FETCH_BYTES)
        for what in ("no certificate", "wrong authority", "wrong role", "expired", "plaintext")
    ]
    results += [_replay(bytes.fromhex(said), ref) for said in order["captured"]]
    print(json.dumps([dataclasses.asdict(result) for result in results]))


def _call(what: str, method: str, ref: EngineRef, order: dict[str, Any]) -> Result:
    """With the right secret: whatever else is wrong must do."""
    name = "router" if method == SESSION else "decode"
    first: Any = kv_pb2.KvMsg(hello=kv_pb2.Hello(engine_id="d", engine_epoch=1, peer_epoch=ref.epoch))
    if method == SESSION:
        first = engine_pb2.RouterFrame(open=engine_pb2.Open(router_id="r"))
    elif method == FETCH_BYTES:
        first = kv_pb2.FetchRequest(engine_epoch=ref.epoch)
    proof = Trust(bytes.fromhex(order["secret"]), name).proof(method, ref)
    began = time.monotonic()
    with _channel(what, method, ref, order) as channel:
        call = channel.stream_stream(method)(iter([first.SerializeToString()]), metadata=proof, timeout=PATIENCE_S)
        got: list[bytes] = []
        try:
            got += call
            words = "OK"
        except grpc.RpcError:
            words = f"{call.code().name}: {call.details()}"
        return Result(what, method, words, time.monotonic() - began, len(got), sum(map(len, got)))


def _channel(what: str, method: str, ref: EngineRef, order: dict[str, Any]) -> grpc.Channel:
    if what == "plaintext":
        return grpc.insecure_channel(ref.target)
    believed = (Path(order["authority"]) / "ca.crt").read_bytes()
    options = [("grpc.ssl_target_name_override", "prefill.diptych.internal")]
    if what == "no certificate":
        return grpc.secure_channel(ref.target, grpc.ssl_channel_credentials(believed), options=options)
    right = "router" if method == SESSION else "decode"
    wrong = "decode" if method == SESSION else "router"
    folder = Path(order[{"wrong authority": "stranger", "wrong role": "authority", "expired": "expired"}[what]])
    name = wrong if what == "wrong role" else right
    shown = [(folder / f"{name}.{end}").read_bytes() for end in ("key", "crt")]
    return grpc.secure_channel(ref.target, grpc.ssl_channel_credentials(believed, *shown), options=options)


def _replay(said: bytes, ref: EngineRef) -> Result:
    """Every byte that a decode engine said on a connection, handshake included."""
    host, port = ref.target.rsplit(":", 1)
    began = time.monotonic()
    heard = 0
    with socket.create_connection((host, int(port)), PATIENCE_S) as peer:
        try:
            peer.sendall(said)
            while piece := peer.recv(1 << 16):
                heard += len(piece)
            words = f"closed after {heard} bytes"
        except ConnectionError as exc:
            words = f"closed: {exc}"
        except TimeoutError:
            words = "OK"
    return Result("replayed bytes", f"{len(said)} of them", words, time.monotonic() - began, 0, 0)


if __name__ == "__main__":
    main()
