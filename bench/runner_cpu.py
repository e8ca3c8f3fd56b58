"""Speed of the runner on a CPU: one process, no scheduler, no network; every sequence decodes in every step.

Regime: greedy, synthetic token ids, context about 160 tokens (128 prompt), block_tokens 16, torch with --threads
threads, one warm-up round; other work on the machine lowers the figures. Prefill is one prompt of 512 tokens.
Usage: python bench/runner_cpu.py MODEL_FOLDER [--dtype bfloat16] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.runner import ModelRunner
from diptych.protos.step import SampleSpec, StepPlan, StepRow

BLOCK_TOKENS = 16
PROMPT = 128
STEPS = 48


def new_runner(model: LoadedModel, sequences: int) -> tuple[ModelRunner, list[list[int]]]:
    blocks_each = -(-max(512, PROMPT + 2 * STEPS) // BLOCK_TOKENS)
    shape = (sequences * blocks_each, model.kv_heads, BLOCK_TOKENS, model.head_dim)
    dtype = getattr(torch, model.dtype)
    kv = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.layers)]
    runner = ModelRunner(model, kv, block_tokens=BLOCK_TOKENS, max_slots=sequences, max_step_tokens=512)
    return runner, [list(range(i * blocks_each, (i + 1) * blocks_each)) for i in range(sequences)]


def greedy(position: int) -> SampleSpec:
    return SampleSpec(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=position)


def prefill(runner: ModelRunner, slot: int, blocks: list[int], length: int) -> float:
    tokens = tuple((7 * i + slot) % 1000 + 5 for i in range(length))
    row = StepRow(slot=slot, num_tokens=length, tokens=tokens, start=0, blocks=blocks, sample=greedy(length))
    begin = time.perf_counter()
    runner.launch(StepPlan(0, (row,)))
    runner.collect()
    return time.perf_counter() - begin


def decode(runner: ModelRunner, blocks: list[list[int]]) -> list[float]:
    times = []
    for position in range(PROMPT, PROMPT + STEPS):
        rows = tuple(
            StepRow(slot=s, num_tokens=1, tokens=None, start=position, blocks=b, sample=greedy(position + 1))
            for s, b in enumerate(blocks)
        )
        begin = time.perf_counter()
        runner.launch(StepPlan(position, rows))
        runner.collect()
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--profile", action="store_true", help="print where the time of a decode step goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    model = load_model(args.folder, dtype=args.dtype)
    result: dict[str, object] = {"load_s": round(time.perf_counter() - begin, 2), "degraded": model.degraded}
    for sequences in args.batches:
        runner, blocks = new_runner(model, sequences)
        for slot, own in enumerate(blocks):
            prefill(runner, slot, own, PROMPT)
        times = decode(runner, blocks)[4:]
        median, p99 = statistics.median(times), sorted(times)[int(len(times) * 0.99)]
        print(
            f"decode batch {sequences}: {sequences / median:.1f} tok/s, step {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f}"
        )
        result[f"decode_{sequences}_tok_s"] = round(sequences / median, 1)
        result[f"decode_{sequences}_p99_ms"] = round(p99 * 1e3, 1)
        if args.profile:
            with torch.profiler.profile() as profile:
                decode(runner, blocks)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=40))
    runner, blocks = new_runner(model, 1)
    seconds = statistics.median([prefill(runner, 0, blocks[0], 512) for _ in range(6)][1:])
    print(f"prefill of 512: {512 / seconds:.0f} tok/s, {seconds * 1e3:.0f} ms")
    result |= {"prefill_512_tok_s": round(512 / seconds), "dtype": args.dtype, "threads": args.threads}
    print(json.dumps(result | {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
