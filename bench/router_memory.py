"""Whether a router's memory stays flat: resident set over many requests of a few tokens, every one of another tenant's
session, a tenth of them cancelled, after a warm-up.

Regime: a prefill and a decode echo engine in processes of their own, the Router alone in this one (no HTTP). Ends with
exit code 1 when the growth after the warm-up exceeds --limit-mib. Run: python bench/router_memory.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing

import psutil
import uvloop

from diptych.cluster.config import PlacementSettings, RouterSettings
from diptych.cluster.router.call import GenerateCall
from diptych.cluster.router.rig import until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import StaticDirectory
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role, SamplingParams


@contextlib.contextmanager
def echo(folder: str, role: Role) -> Iterator[EngineInfo]:
    target, name = f"unix:{folder}/{role}", f"{role}-0"
    args = ["-m", "diptych.cluster.router.testing", "--target", target, "--engine-id", name, "--roles", role.value]
    with subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
            yield EngineInfo(
                ref=EngineRef(EngineId(name), 1, target),
                roles=frozenset({role}),
                model="echo",
                pid=process.pid,
                host="localhost",
                block_tokens=16,
                num_blocks=1 << 16,
                max_context_tokens=8192,
                dtype="none",
            )
        finally:
            process.terminate()


async def ask(router: Router, number: int) -> None:
    call = GenerateCall(
        model="echo",
        prompt=tuple(range(number % 1000, number % 1000 + 40)),
        sampling=SamplingParams(max_tokens=4),
        tenant=f"tenant-{number}",
        salt=b"%d" % number,
        session=f"session-{number}",
    )
    async with aclosing(router.generate(call)) as deltas:
        async for _ in deltas:
            if number % 10 == 0:
                return  # the client went away


async def ask_many(router: Router, first: int, count: int, streams: int) -> None:
    numbers = iter(range(first, first + count))

    async def stream() -> None:
        for number in numbers:
            await ask(router, number)

    await asyncio.gather(*(stream() for _ in range(streams)))


def resident_mib() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / (1 << 20)


async def measure(args: argparse.Namespace, engines: list[EngineInfo]) -> list[float]:
    settings = RouterSettings(placement=PlacementSettings(policy=args.policy))
    router = Router(directory=StaticDirectory(engines), settings=settings)
    await router.start()
    await until(lambda: all(s.is_ready for s in router.view.sessions()))
    part = args.requests // 10
    await ask_many(router, 0, args.warm_up, args.streams)
    readings = [resident_mib()]
    for number in range(10):
        await ask_many(router, args.warm_up + number * part, part, args.streams)
        readings.append(resident_mib())
        print(f"{(number + 1) * part:>8} requests  {readings[-1]:7.1f} MiB", flush=True)
    await router.stop()
    return readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--limit-mib", type=float, default=4.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, echo(folder, Role.PREFILL) as p, echo(folder, Role.DECODE) as d:
        begin = time.perf_counter()
        readings = uvloop.run(measure(args, [p, d]))
        seconds = time.perf_counter() - begin
    growth = max(readings[1:]) - readings[0]
    rate = (args.requests + args.warm_up) / seconds
    result = {"readings_mib": [round(r, 1) for r in readings], "growth_mib": round(growth, 2), "requests_per_s": rate}
    print(json.dumps({"bench": "router_memory", "config": vars(args), "results": result}))
    sys.exit(growth > args.limit_mib)


if __name__ == "__main__":
    main()
