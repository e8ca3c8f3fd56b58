"""What the router adds: first-token latency against a bare gRPC session, and tokens per second over many streams.

Regime: one echo engine with both roles in a process of its own (it computes nothing), the router and its listener in
another, clients in this one, all on one host. So the figures are the cost of API, router and gRPC together, with all
three processes sharing the machine's cores. Run: python bench/router.py [--serve]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import uvloop

from diptych.cluster.api.app import create_app
from diptych.cluster.api.listener import start_listener
from diptych.cluster.api.render import Renderer
from diptych.cluster.api.served import ServedModel
from diptych.cluster.api.testing import TEMPLATE, byte_level_tokenizer
from diptych.cluster.config import RouterSettings
from diptych.cluster.router.rig import until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import StaticDirectory
from diptych.cluster.store.testing import temporary_store
from diptych.protos import engine_pb2 as pb
from diptych.protos.engine_pb2_grpc import EngineStub
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role

WARMUP = 50
PROMPT_TOKENS = 128


def engine_info(target: str) -> EngineInfo:
    return EngineInfo(
        ref=EngineRef(EngineId("echo-0"), 1, target),
        roles=frozenset({Role.PREFILL, Role.DECODE}),
        model="echo",
        pid=0,
        host="localhost",
        block_tokens=16,
        num_blocks=1 << 16,
        max_context_tokens=8192,
        dtype="none",
    )


def served_model() -> ServedModel:
    tokenizer = byte_level_tokenizer()
    return ServedModel(
        name="echo",
        renderer=Renderer(tokenizer, TEMPLATE),
        vocab_size=tokenizer.get_vocab_size(),
        max_context_tokens=8192,
        eos_token_ids=frozenset(),
    )


async def serve_front_door(target: str) -> None:
    """The router process: prints its port, ends when its input does."""
    settings = RouterSettings()
    router = Router(directory=StaticDirectory([engine_info(target)]), settings=settings)
    await router.start()
    await until(lambda: router.is_ready("echo"))
    async with temporary_store() as store:
        app = create_app(router, [served_model()], store=store)
        listener = await start_listener(app, host="127.0.0.1", port=0, limits=settings.limits)
        print(listener.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await listener.stop(0.1)
        await router.stop()


@contextlib.contextmanager
def child(*args: str) -> Any:
    """A Python process; yields the first line it prints; ended by closing its input and a signal."""
    with subprocess.Popen([sys.executable, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class Http:
    """The smallest client that can read a stream: one connection, one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Http:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()

    async def stream(self, max_tokens: int) -> AsyncIterator[bytes]:
        """Network reads of one answer's body."""
        prompt = list(range(10, 10 + PROMPT_TOKENS))
        body = json.dumps({"model": "echo", "prompt": prompt, "max_tokens": max_tokens, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        self._writer.write(head.encode() + b"\r\n\r\n" + body)
        status = await self._reader.readline()
        assert b" 200 " in status, status
        while (await self._reader.readline()) != b"\r\n":
            pass
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = await self._reader.read(1 << 18)
            assert data
            yield data
            tail = (tail + data)[-16:]


class Bare:
    """The reference: the same request on a gRPC session without router or HTTP."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._handle = 0

    async def __aenter__(self) -> Bare:
        self._channel = grpc.aio.insecure_channel(self._target)
        self._call = EngineStub(self._channel).Session()  # type: ignore[no-untyped-call]
        await self._call.write(pb.RouterFrame(open=pb.Open(router_id="bench")))
        assert (await self._call.read()).WhichOneof("frame") == "welcome"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._call.cancel()
        await self._channel.close()

    async def _submit(self, max_tokens: int) -> None:
        self._handle += 1
        submit = pb.Submit(
            handle=self._handle,
            transfer_id=os.urandom(16),
            phase=pb.PHASE_DECODE,
            prompt=range(10, 10 + PROMPT_TOKENS),
            sampling=pb.Sampling(max_tokens=max_tokens, top_p=1.0),
        )
        await self._call.write(pb.RouterFrame(submit=submit))

    async def many(self, streams: int, tokens: int) -> int:
        """Frames that carried the tokens of so many requests at once."""
        for _ in range(streams):
            await self._submit(tokens)
        frames, left = 0, streams
        while left:
            frame = await self._call.read()
            frames += len(frame.tokens.token) > 0
            left -= len(frame.tokens.finishes)
        return frames

    async def stream(self, max_tokens: int) -> AsyncIterator[bytes]:
        """One item per frame that carries tokens."""
        await self._submit(max_tokens)
        while True:
            frame = await self._call.read()
            if frame.WhichOneof("frame") != "tokens":
                continue
            if len(frame.tokens.token):
                yield b""
            if len(frame.tokens.finishes):
                return


async def first_token_ms(client: Http | Bare, count: int) -> list[float]:
    times = []
    for number in range(WARMUP + count):
        begin = time.perf_counter()
        first = 0.0
        async for _ in client.stream(4):
            first = first or time.perf_counter() - begin
        if number >= WARMUP:
            times.append(first * 1e3)
    return times


async def bare_rate(target: str, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of all streams on one session, and tokens per stream and frame."""
    async with Bare(target) as bare:
        frames = await bare.many(8, tokens)
        begin = time.perf_counter()
        frames = await bare.many(streams, tokens)
        return streams * tokens / (time.perf_counter() - begin), tokens / frames


async def http_rate(port: int, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of all streams, a connection each, and tokens per event. A smaller round warms up."""
    events = 0

    async def one(client: Http) -> None:
        nonlocal events
        async for data in client.stream(tokens):
            events += data.count(b"data: ")

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Http(port)) for _ in range(streams)]
        await asyncio.gather(*(one(client) for client in clients[:8]))
        events, begin = 0, time.perf_counter()
        await asyncio.gather(*(one(client) for client in clients))
        return streams * tokens / (time.perf_counter() - begin), streams * tokens / (events - 2 * streams)


@contextlib.contextmanager
def serve_proxy(target: str) -> Any:
    """The same app as a Ray Serve ingress behind Serve's own HTTP proxy; yields the proxy's port."""
    import ray
    from ray import serve

    @serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    @serve.ingress()
    class Ingress:
        async def __init__(self) -> None:  # type: ignore[misc] # Serve awaits it
            self._router = Router(directory=StaticDirectory([engine_info(target)]), settings=RouterSettings())
            await self._router.start()
            await until(lambda: self._router.is_ready("echo"))
            store = await contextlib.AsyncExitStack().enter_async_context(temporary_store())
            self._app = create_app(self._router, [served_model()], store=store)

        def __serve_build_asgi_app__(self) -> Any:
            return self._app

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            Ingress.bind(),  # type: ignore[attr-defined]
            name="bench",
            route_prefix="/",
        )
        yield port
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def quantiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


Rate = Callable[[int, int], Coroutine[Any, Any, tuple[float, float]]]


async def measure(client: Http | Bare, rate: Rate, args: argparse.Namespace) -> dict[str, float]:
    async with client:
        p50, p99 = quantiles(await first_token_ms(client, args.requests))
    rounds = sorted([await rate(args.streams, args.tokens) for _ in range(args.rounds)])
    tokens_per_s, tokens_per_event = rounds[len(rounds) // 2]
    return {
        "first_p50_ms": p50,
        "first_p99_ms": p99,
        "tokens_per_s": tokens_per_s,
        "tokens_per_event": tokens_per_event,
    }


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        target = f"unix:{folder}/echo"
        with child("-m", "diptych.cluster.router.testing", "--target", target, "--engine-id", "echo-0") as said:
            assert said == "ready"
            results["bare gRPC session"] = uvloop.run(measure(Bare(target), partial(bare_rate, target), args))
            pinned = [] if args.router_core is None else ["--router-core", str(args.router_core)]
            with child(__file__, "--front-door", target, *pinned) as said:
                port = int(said)
                results["own listener"] = uvloop.run(measure(Http(port), partial(http_rate, port), args))
            if args.serve:
                with serve_proxy(target) as port:
                    results["Serve HTTP proxy"] = uvloop.run(measure(Http(port), partial(http_rate, port), args))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="measure Ray Serve's HTTP proxy too")
    parser.add_argument("--router-core", type=int, help="the router's process runs on this core alone (Linux)")
    parser.add_argument("--front-door", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.front_door:
        if args.router_core is not None:
            os.sched_setaffinity(0, {args.router_core})
        uvloop.run(serve_front_door(args.front_door))
        return
    results = run(args)
    base = results["bare gRPC session"]
    print(
        f"{'':20}{'first token p50':>17}{'p99':>9}{'added p50':>12}{'added p99':>12}"
        f"{'tok/s':>10}{'of bare':>9}{'tok/event':>11}"
    )
    for name, row in results.items():
        added = [row[key] - base[key] for key in ("first_p50_ms", "first_p99_ms")]
        row["added_p50_ms"], row["added_p99_ms"] = added
        row["of_bare"] = row["tokens_per_s"] / base["tokens_per_s"]
        print(
            f"{name:20}{row['first_p50_ms']:14.2f} ms{row['first_p99_ms']:6.2f} ms{added[0]:9.2f} ms{added[1]:9.2f} ms"
            f"{row['tokens_per_s']:10.0f}{row['of_bare']:9.2f}{row['tokens_per_event']:11.2f}"
        )
    names = ("diptych", "grpcio", "uvicorn", "starlette", "ray")
    versions = {name: importlib.metadata.version(name) for name in names}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    context = {
        "commit": commit,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    print(json.dumps({"bench": "router", **context, "versions": versions, "config": vars(args), "results": results}))


if __name__ == "__main__":
    main()
