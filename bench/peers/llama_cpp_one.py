"""llama-cpp-python on a prompts file, one request after another. Runs in an environment of its own. Prints a JSON line.

Usage: python llama_cpp_one.py FILE.gguf PROMPTS.jsonl [--requests N] [--output 64] [--repeats 1]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("gguf")
    ap.add_argument("prompts")
    ap.add_argument("--requests", type=int, default=8)
    ap.add_argument("--output", type=int, default=64)
    ap.add_argument("--repeats", type=int, default=1)
    args = ap.parse_args()
    from llama_cpp import Llama, LogitsProcessorList

    llm = Llama(args.gguf, n_ctx=1024, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False)
    with open(args.prompts) as file:
        prompts = [json.loads(line)["prompt"] for line in file][: args.requests]
    end = llm.token_eos()

    def run(prompt: str) -> int:
        llm.reset()
        count = 0
        ids = llm.tokenize(prompt.encode())
        for _ in llm.generate(
            ids, temp=0.0, logits_processor=LogitsProcessorList([lambda _, scores: _without(scores, end)])
        ):
            count += 1
            if count == args.output:
                return count
        return count

    run(prompts[0])
    for _ in range(args.repeats):
        start = time.perf_counter()
        tokens = sum(map(run, prompts))
        seconds = time.perf_counter() - start
        result = {"system": "llama.cpp Q4_1 one by one", "requests": len(prompts), "s": round(seconds, 3)}
        print(json.dumps(result | {"output_tok_s": round(tokens / seconds, 1)}), flush=True)


def _without(scores: np.ndarray, token: int) -> np.ndarray:
    scores[token] = float("-inf")
    return scores


if __name__ == "__main__":
    main()
