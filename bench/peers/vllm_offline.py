"""vLLM's `LLM` on a prompts file; runs in an environment of its own (see README.md). Prints one JSON line per repeat.

Usage: python vllm_offline.py MODEL_FOLDER PROMPTS.jsonl [--requests N] [--output 64] [--repeats 2] [--compiled]
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("model")
    ap.add_argument("prompts")
    ap.add_argument("--requests", type=int, default=64)
    ap.add_argument("--output", type=int, default=64)
    ap.add_argument("--repeats", type=int, default=2)
    ap.add_argument("--compiled", action="store_true")
    args = ap.parse_args()
    began = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(args.model, dtype="bfloat16", max_model_len=1024, max_num_seqs=64, enforce_eager=not args.compiled)
    startup_s = time.perf_counter() - began
    with open(args.prompts) as file:
        prompts = [json.loads(line)["prompt"] for line in file][: args.requests]
    sampling = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    llm.generate(prompts[:2], sampling, use_tqdm=False)
    for _ in range(args.repeats):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        name = "vllm-cpu compiled" if args.compiled else "vllm-cpu eager"
        result = {"system": name, "requests": len(prompts), "s": round(seconds, 3), "startup_s": round(startup_s, 1)}
        print(json.dumps(result | {"output_tok_s": round(tokens / seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
