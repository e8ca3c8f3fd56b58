"""transformers' `generate` on a prompts file, one by one or in static batches with left padding. Prints a JSON line.

Usage: python transformers_generate.py MODEL_FOLDER PROMPTS.jsonl [--requests N] [--batch 1] [--output 64] [--repeats 1]
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("model")
    ap.add_argument("prompts")
    ap.add_argument("--requests", type=int, default=64)
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--output", type=int, default=64)
    ap.add_argument("--repeats", type=int, default=1)
    args = ap.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    with open(args.prompts) as file:
        prompts = [json.loads(line)["prompt"] for line in file][: args.requests]

    def run(batch: list[str]) -> int:
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=args.output, min_new_tokens=args.output, pad_token_id=0
        )
        return int(out[:, inputs["input_ids"].shape[1] :].numel())

    run(prompts[:1])
    for _ in range(args.repeats):
        start = time.perf_counter()
        tokens = sum(run(prompts[i : i + args.batch]) for i in range(0, len(prompts), args.batch))
        seconds = time.perf_counter() - start
        result = {"system": f"transformers batch {args.batch}", "requests": len(prompts), "s": round(seconds, 3)}
        print(json.dumps(result | {"output_tok_s": round(tokens / seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
