"""Five kinds of payload that run code where somebody deserialises them too readily: on every listening socket, in every
bytes and text field of every internal message, in every file and stored value that a process reads. Nothing runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from small_cluster import SmallCluster, connected, small_cluster
from strangers import Bomb, listening, throw, told, unchanged

from diptych.cluster.config import load_config
from diptych.cluster.control.kept import read_kept
from diptych.cluster.control.keyring import fetch
from diptych.cluster.control.manager import PoolManager
from diptych.cluster.control.state import find_cluster
from diptych.cluster.key_file import read_keys
from diptych.cluster.models import resolve
from diptych.cluster.security import read_secret
from diptych.protos import engine_pb2, kv_pb2
from diptych.protos.channels import FETCH_BYTES, KV_SESSION, SESSION
from diptych.protos.errors import StartupError
from diptych.protos.faults import FaultPlan, FaultSettings
from diptych.protos.trust import Trust


class Code:
    """As cloudpickle and dill pack functions: source or bytecode, for an evaluator."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __reduce__(self) -> tuple[object, ...]:
        return eval, (self._source,)


MARKERS = ("py/object", "py/reduce", "__reduce__", "__class__", "lc", "!!python/object/apply", "$type")


def payloads(canary: Path) -> dict[str, bytes]:
    """By kind; each touches the canary when it is loaded by what it is made for."""
    bomb = pickle.dumps(Bomb(canary))
    command = f"touch {canary}"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", bomb)
        zipped.writestr("archive/version", "3")
    marked = {key: ["os.system", [command], {"py/tuple": [command]}] for key in MARKERS}
    extended = b"".join(b"\xc8" + struct.pack(">HB", len(bomb), code) + bomb for code in range(128))
    return {
        "a pickle": bomb,
        "a pickle of code": pickle.dumps(Code(f"__import__('os').system({command!r})"), protocol=5),
        "msgpack, extensions 0 to 127": b"\xdc\x00\x80" + extended,
        "torch.save": archive.getvalue(),
        "JSON with class markers": json.dumps(marked).encode(),
        "YAML with a constructor": f"!!python/object/apply:os.system ['{command}']\n".encode(),
    }


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def cluster(run_dir: Path) -> AsyncIterator[SmallCluster]:
    async with small_cluster(run_dir, run_dir) as made:
        yield await connected(made)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def test_the_payloads_are_sharp(tmp_path: Path) -> None:
    """Or a test that finds no canary would prove nothing."""
    path = tmp_path / "touched"
    for what in ("a pickle", "a pickle of code"):
        pickle.loads(payloads(path)[what])
        assert path.exists(), what
        path.unlink()
    with zipfile.ZipFile(io.BytesIO(payloads(path)["torch.save"])) as zipped:
        pickle.loads(zipped.read("archive/data.pkl"))
    assert path.exists()


async def test_on_every_listening_socket(cluster: SmallCluster, caplog: pytest.LogCaptureFixture, canary: Path) -> None:
    async with unchanged(cluster, caplog):
        for target in sorted(listening()):
            for data in payloads(canary).values():
                await throw(target, data)
        async with httpx2.AsyncClient(base_url=cluster.listener.url) as http:
            for data in payloads(canary).values():
                for path in ("/v1/completions", "/v1/chat/completions"):
                    for kind in ("application/json", "application/octet-stream", "application/x-python-pickle"):
                        reply = await http.post(path, content=data, headers={"content-type": kind})
                        assert 400 <= reply.status_code < 500
                        assert reply.json()["error"]["code"]


def fields(descriptor: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a message holds bytes or text, itself and in the messages within it."""
    for field in descriptor.fields:
        here = (*path, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.message_type.GetOptions().map_entry:
            yield from fields(field.message_type, here)
        elif field.type in (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING):
            yield here


def spoilt(message: Message, path: tuple[str, ...], data: bytes) -> Message:
    """`message` with `data` at `path`; text as Latin-1, in which every byte is a character."""
    at, *rest = path
    field = message.DESCRIPTOR.fields_by_name[at]
    value: bytes | str = data if field.type == FieldDescriptor.TYPE_BYTES else data.decode("latin-1")
    if rest:
        inner = getattr(message, at)
        spoilt(inner.add() if field.is_repeated else inner, tuple(rest), data)
    elif field.is_repeated:
        getattr(message, at).append(value)
    else:
        setattr(message, at, value)
    return message


CALLS: dict[str, tuple[str, Callable[[], Message]]] = {
    SESSION: ("router", engine_pb2.RouterFrame),
    KV_SESSION: ("decode", kv_pb2.KvMsg),
    FETCH_BYTES: ("decode", kv_pb2.FetchRequest),
}


async def test_in_every_bytes_and_text_field_of_a_caller_that_holds_the_secret(
    cluster: SmallCluster, canary: Path
) -> None:
    """The fields are those of the descriptors, so that a new one is among them."""
    before = await cluster.answer("t1 t2 t3")
    num_fields = 0
    for ref in cluster.refs.values():
        for method, (name, make) in CALLS.items():
            trust = Trust(cluster.secret, name)
            opening: list[bytes] = []
            if method == SESSION:
                opening = [engine_pb2.RouterFrame(open=engine_pb2.Open(router_id="x")).SerializeToString()]
            for path in fields(make().DESCRIPTOR):
                num_fields += 1
                for data in payloads(canary).values():
                    body = spoilt(make(), path, data).SerializeToString()
                    proof = trust.proof(method, ref)
                    frames = [*([] if path[0] == "open" else opening), body]
                    await asyncio.to_thread(told, ref, method, frames, proof, trust)
    assert num_fields >= 2 * 20
    assert await cluster.answer("t1 t2 t3") == before
    await cluster.at_rest()
    for engine in cluster.alive.values():
        assert engine.status().counters["kv_thread_faults_total"] == 0


def keys_of(file: Path) -> object:
    return read_keys(file)


def plan_of_faults(file: Path) -> object:
    plan = FaultPlan(FaultSettings(file=file), me="x")
    plan.close()
    return plan.counts


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "diptych.yaml": ("diptych.yaml", load_config),
    "the secret": ("secret", read_secret),
    "the API keys": ("keys.jsonl", keys_of),
    "the fault plan": ("faults.json", plan_of_faults),
    "the state of a running cluster": ("r/c-1/state.json", lambda file: find_cluster(file.parent.parent)),
    "a model's GGUF file": ("m.gguf", lambda file: resolve(str(file), file.parent / "cache")),
    "a model's weights": ("m/model.safetensors", lambda file: resolve(str(file.parent), file.parent)),
    "a model's config": ("m/config.json", lambda file: resolve(str(file.parent), file.parent)),
    "a model's tokenizer": ("m/tokenizer.json", lambda file: resolve(str(file.parent), file.parent)),
}


@pytest.mark.parametrize("reader", READERS)
def test_in_every_file_that_is_read(reader: str, tmp_path: Path, canary: Path) -> None:
    name, read = READERS[reader]
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    for data in payloads(canary).values():
        file.write_bytes(data)
        file.chmod(0o600)
        with contextlib.suppress(StartupError):
            read(file)


class Store(dict[str, bytes]):
    """Ray's key-value store, in which all values are the same."""

    def __init__(self, value: bytes) -> None:
        self.value = value

    def get(self, key: str, default: object = None) -> bytes:  # type: ignore[override]
        return self.value

    def put(self, key: str, value: bytes) -> None:
        pass


STORED: dict[str, Callable[[Store], object]] = {
    "members": lambda store: PoolManager(store),
    "the plan": lambda store: read_kept(store),
    "the cluster's secret": lambda store: fetch(store),
}


@pytest.mark.parametrize("reader", STORED)
def test_in_every_stored_value(reader: str, canary: Path) -> None:
    """Text of our own in a form of our own, or it is no value at all."""
    for data in payloads(canary).values():
        with pytest.raises((ValueError, TypeError, KeyError, StartupError)):
            STORED[reader](Store(data))
