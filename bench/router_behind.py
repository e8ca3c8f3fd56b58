"""What a router does whose engine is faster than it: many answers, one step of all of them every few milliseconds.

Regime: a paced engine that computes nothing and this client on one core, the router and its listener alone on another
(Linux, two cores). The router's CPU time is the kernel's count for its process. Run:
python bench/router_behind.py [--streams 512] [--step-ms 9 --step-ms 18] [--words] [--json OUT.json]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from router import PROMPT_TOKENS, child, engine_info, served_model  # bench/router.py
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from diptych.cluster.api.app import create_app
from diptych.cluster.api.listener import start_listener
from diptych.cluster.api.render import Renderer
from diptych.cluster.api.served import ServedModel
from diptych.cluster.api.testing import TEMPLATE
from diptych.cluster.bench.provenance import commit_of
from diptych.cluster.config import RouterSettings
from diptych.cluster.router.rig import until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import EchoEngine, StaticDirectory
from diptych.cluster.store.testing import temporary_store
from diptych.protos import engine_pb2 as pb
from diptych.protos.codec import finish_to_pb, order_from_pb, status_to_pb
from diptych.protos.types import Finish, FinishReason, Role

CLIENT_CORE, ROUTER_CORE = 1, 0
FIRST = b"data: "


class PacedEngine(EchoEngine):
    """Waits for `streams` orders, then makes a token of each of them every `step_s` seconds, all in one message."""

    def __init__(self, target: str, streams: int, step_s: float) -> None:
        super().__init__(target, engine_id="echo-0", roles=frozenset(Role))
        self._streams, self._pace_s = streams, step_s

    async def Session(self, requests: AsyncIterator[pb.RouterFrame], context: Any) -> AsyncIterator[pb.EngineFrame]:
        """The RPC."""
        await anext(aiter(requests))
        frames: asyncio.Queue[pb.EngineFrame] = asyncio.Queue()
        frames.put_nowait(pb.EngineFrame(welcome=self._welcome()))
        tasks = [asyncio.create_task(part) for part in (self._listen(requests, frames), self._report(frames))]
        try:
            while True:
                yield await frames.get()
        finally:
            for task in tasks:
                task.cancel()

    async def _report(self, frames: asyncio.Queue[pb.EngineFrame]) -> None:
        while True:
            frames.put_nowait(pb.EngineFrame(status=status_to_pb(self.status())))
            await asyncio.sleep(0.25)

    async def _listen(self, requests: AsyncIterator[pb.RouterFrame], frames: asyncio.Queue[pb.EngineFrame]) -> None:
        waiting: list[tuple[int, Any]] = []
        async for frame in requests:
            if frame.WhichOneof("frame") == "submit":
                waiting.append((frame.submit.handle, order_from_pb(frame.submit, 0.0)))
            if len(waiting) == self._streams:
                await self._generate(waiting, frames)
                waiting = []

    async def _generate(self, orders: list[tuple[int, Any]], frames: asyncio.Queue[pb.EngineFrame]) -> None:
        handles = [handle for handle, _ in orders]
        total = orders[0][1].request.sampling.max_tokens
        begin = time.monotonic()
        for index in range(total):
            await asyncio.sleep(begin + (index + 1) * self._pace_s - time.monotonic())
            tokens = [(handle + index) % 250 + 3 for handle in handles]
            step = pb.StepTokens(handle=handles, index=[index] * len(handles), token=tokens)
            for handle, order in orders if index == total - 1 else ():
                end = Finish(key=order.request.key, role=Role.DECODE, reason=FinishReason.LENGTH, num_tokens=total)
                step.finishes.append(finish_to_pb(handle, end))
            frames.put_nowait(pb.EngineFrame(tokens=step))


def model_of_words() -> ServedModel:
    """As benchmarks of random weights have it: every token is a word."""
    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(128_256)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return dataclasses.replace(served_model(), renderer=Renderer(tokenizer, TEMPLATE), vocab_size=128_256)


async def serve_engine(target: str, streams: int, step_s: float) -> None:
    """The engine's process."""
    engine = PacedEngine(target, streams, step_s)
    await engine.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def serve_front_door(target: str, *, words: bool) -> None:
    """The router's process: prints its port and its number."""
    settings = RouterSettings.model_validate({"limits": {"max_running": 4096, "max_connections": 8192}})
    router = Router(directory=StaticDirectory([engine_info(target)]), settings=settings)
    await router.start()
    await until(lambda: router.is_ready("echo"))
    async with temporary_store() as store:
        app = create_app(router, [model_of_words() if words else served_model()], store=store)
        listener = await start_listener(app, host="127.0.0.1", port=0, limits=settings.limits)
        print(listener.port, os.getpid(), flush=True)
        await asyncio.to_thread(sys.stdin.read)


class Answer(asyncio.Protocol):
    """One connection with one streamed answer."""

    def __init__(self) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self.events, self.gaps, self._last = 0, list[float](), 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, max_tokens: int) -> None:
        prompt = list(range(10, 10 + PROMPT_TOKENS))
        body = json.dumps({"model": "echo", "prompt": prompt, "max_tokens": max_tokens, "stream": True}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        self.transport.write(head % len(body) + body)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._last:
            self.gaps.append(now - self._last)
        self._last = now
        self.events += data.count(FIRST)
        if data.endswith(b"\r\n0\r\n\r\n") and not self.done.done():
            self.done.set_result(None)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(port: int, pid: int, streams: int, tokens: int) -> dict[str, float]:
    """One round of all streams at once; a round before it does not count."""
    loop = asyncio.get_running_loop()
    for _ in range(2):
        answers = [(await loop.create_connection(Answer, "127.0.0.1", port))[1] for _ in range(streams)]
        used, began = cpu_seconds(pid), time.perf_counter()
        for answer in answers:
            answer.ask(tokens)
        await asyncio.gather(*(answer.done for answer in answers))
        seconds, used = time.perf_counter() - began, cpu_seconds(pid) - used
        for answer in answers:
            answer.transport.close()
    gaps = sorted(gap for answer in answers for gap in answer.gaps)
    events = sum(answer.events for answer in answers) - 2 * streams  # the finish and [DONE]
    return {
        "tokens_per_s": round(streams * tokens / seconds),
        "router_us_per_token": round(used / (streams * tokens) * 1e6, 1),
        "tokens_per_event": round(streams * tokens / events, 2),
        "gap_p50_ms": round(gaps[len(gaps) // 2] * 1e3, 1),
        "gap_p99_ms": round(gaps[len(gaps) * 99 // 100] * 1e3, 1),
    }


def run(args: argparse.Namespace, step_ms: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        target = f"unix:{folder}/engine"
        given = ["--target", target, "--streams", str(args.streams), "--step-ms", str(step_ms)]
        words = ["--words"] if args.words else []
        with child(__file__, "--role", "engine", *given), child(__file__, "--role", "router", *given, *words) as said:
            port, pid = map(int, said.split())
            return uvloop.run(measure(port, pid, args.streams, args.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--step-ms", type=float, action="append", help="of the engine; may be repeated (9 and 18)")
    parser.add_argument("--words", action="store_true", help="a tokenizer of whole words instead of a byte-level one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=("engine", "router"), help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {ROUTER_CORE if args.role == "router" else CLIENT_CORE})
    if args.role == "engine":
        asyncio.run(serve_engine(args.target, args.streams, args.step_ms[0] / 1e3))
    elif args.role == "router":
        uvloop.run(serve_front_door(args.target, words=args.words))
    else:
        commit, dirty = commit_of(Path(__file__).parent)
        found: dict[str, Any] = {"bench": "router_behind", "commit": commit, "dirty": dirty, "cores": os.cpu_count()}
        found |= {"streams": args.streams, "tokens": args.tokens, "words": args.words}
        for step_ms in args.step_ms or (18.0, 9.0):
            found[f"a step every {step_ms:g} ms"] = row = run(args, step_ms)
            print(
                f"a step every {step_ms:g} ms:", ", ".join(f"{key} {value:,}" for key, value in row.items()), flush=True
            )
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
