"""Whether typed results need retries on an own cluster: 500 extractions over the 20 types of extraction_types.py.

Regime: `diptych serve` with the default model as a child process, `llm.call(output=...)` at temperature 1 over HTTP,
so many at once. A retry is syntactic where the answer was no JSON, or not what its type takes. Exit code 1 when there
is one, or when a finished object does not validate. Run: python bench/typed_extractions.py
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extraction_types import KINDS, texts

from diptych.agents import llm
from diptych.cluster.bench.figures import regime, write_result
from diptych.cluster.bench.provenance import provenance

COUNTS = ("values", "truncated", "syntactic", "others", "attempts", "tokens")


@dataclass(slots=True)
class Row:
    """Of one type. `syntactic`: attempts whose answer was not what the type takes."""

    values: int = 0
    truncated: int = 0
    syntactic: int = 0
    others: int = 0
    attempts: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


async def extracted(name: str, text: str, seed: int, model: str, limit: asyncio.Semaphore, row: Row) -> None:
    """One extraction, counted."""

    @llm.call(model, output=KINDS[name], temperature=1.0, max_tokens=200, seed=seed, timeout=900)
    async def extract(text: str) -> str:
        return f"Extract the {name} from this text.\n\n{text}"

    async with limit:
        try:
            reply = await extract(text)
        except llm.CallFailed as exc:
            attempts = exc.attempts
            if not isinstance(exc, llm.Truncated):
                row.others += 1
                row.errors.append(str(exc)[:300])
        else:
            attempts = reply.attempts
            row.values += 1
    row.attempts += len(attempts)
    for attempt in attempts:
        row.tokens += attempt.spent.output_tokens
        row.syntactic += isinstance(attempt.error, llm.InvalidOutput)
        row.truncated += isinstance(attempt.error, llm.Truncated)
        if isinstance(attempt.error, llm.InvalidOutput):
            row.errors.append(f"{attempt.error} :: {attempt.text[:200]}")


async def measured(model: str, each: int, at_once: int) -> dict[str, Row]:
    """All of it."""
    rows = {name: Row() for name in KINDS}
    limit = asyncio.Semaphore(at_once)
    jobs = [
        extracted(name, text, seed, model, limit, rows[name])
        for name in KINDS
        for seed, text in enumerate(texts(name, each))
    ]
    await asyncio.gather(*jobs)
    return rows


def main() -> int:
    """Exit code 1 where one was invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pool/smollm2-135m-instruct", help="with $DIPTYCH_URL, or a served cluster")
    parser.add_argument("--each", type=int, default=25, help="extractions of each type")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a file for the result")
    options = parser.parse_args()
    began = time.monotonic()
    rows = asyncio.run(measured(options.model, options.each, options.at_once))
    seconds = time.monotonic() - began
    print(f"{'type':<16}{'values':>8}{'cut off':>9}{'syntactic':>11}{'others':>8}{'attempts':>10}{'tokens':>9}")
    for name, row in rows.items():
        counts = (row.values, row.truncated, row.syntactic, row.others, row.attempts, row.tokens)
        print(f"{name:<16}{'{:>8}{:>9}{:>11}{:>8}{:>10}{:>9}'.format(*counts)}")
        for error in row.errors[:3]:
            print(f"    {error}")
    sums = Counter[str]()
    for row in rows.values():
        sums.update({key: getattr(row, key) for key in COUNTS})
    print(regime())
    result: dict[str, Any] = {
        "benchmark": "typed_extractions",
        "model": options.model,
        "asked": options.each * len(KINDS),
        **sums,
        "seconds": round(seconds, 1),
        "types": {name: {key: getattr(row, key) for key in COUNTS} for name, row in rows.items()},
        **provenance(),
    }
    write_result(result, options.out)
    return int(bool(sums["syntactic"] or sums["others"]))


if __name__ == "__main__":
    sys.exit(main())
