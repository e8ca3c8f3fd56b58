"""A running cluster under the CPU workload: requests of about 128 random tokens in, half of them sharing 64, streamed.

Regime: closed loop with --streams at once, greedy, end tokens ignored, token ids as prompts, no warm-up beyond --warmup
requests. Usage: python bench/serve_load.py [--url http://127.0.0.1:8000] [--requests 64] [--streams 64] [--output 64]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time

import httpx2

PREFIX = 64
PROMPT = 128
IDS = range(100, 40_000)


def make_prompts(count: int) -> list[list[int]]:
    rng = random.Random(7)
    shared = rng.choices(IDS, k=PREFIX)
    heads = [shared if i % 2 == 0 else rng.choices(IDS, k=PREFIX) for i in range(count)]
    return [head + rng.choices(IDS, k=PROMPT - PREFIX) for head in heads]


async def ask(client: httpx2.AsyncClient, model: str, prompt: list[int], output: int) -> list[float]:
    """Seconds from the request to each event."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begin = time.perf_counter()
    times = []
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{reply.status_code}: {(await reply.aread()).decode()}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter() - begin)
    return times


async def run(args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, float]:
    limits = httpx2.Limits(max_connections=args.streams)
    async with httpx2.AsyncClient(base_url=args.url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        gate = asyncio.Semaphore(args.streams)

        async def one(prompt: list[int]) -> list[float]:
            async with gate:
                return await ask(client, model, prompt, args.output)

        begin = time.perf_counter()
        times = await asyncio.gather(*(one(prompt) for prompt in prompts))
        seconds = time.perf_counter() - begin
    return {
        "output_tok_s": round(len(prompts) * args.output / seconds, 1),
        "ttft_p50_s": round(statistics.median(t[0] for t in times), 3),
        "ttft_max_s": round(max(t[0] for t in times), 3),
        "tpot_p50_ms": round(1e3 * statistics.median((t[-1] - t[0]) / (args.output - 1) for t in times), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    prompts = make_prompts(args.warmup + args.requests)
    asyncio.run(run(args, prompts[: args.warmup]))
    result = asyncio.run(run(args, prompts[args.warmup :]))
    for name, value in result.items():
        print(f"{name:14} {value}")
    print(
        json.dumps({"bench": "serve_load", "cores": os.cpu_count(), "load": os.getloadavg()[0], **vars(args), **result})
    )


if __name__ == "__main__":
    main()
