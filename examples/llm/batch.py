"""Many calls of one function as a batch: typed results by id, progress, failures, and a job that outlives a program.

From a command line, with a line of JSON for each review: diptych batch submit batch.py:judge reviews.jsonl
"""

from __future__ import annotations

import os
import sys
from typing import Literal

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [{"value": "good"}, {"value": "bad"}, "I cannot tell", {"value": "good"}]


@llm.call(MODEL, output=Literal["good", "bad"], max_tokens=20)
def judge(review: str) -> str:
    return f"Is this review good or bad? {review}"


def main() -> None:
    reviews = {"r1": "I loved it.", "r2": "I left early.", "r3": "It was a film."}
    results = llm.batch(judge, reviews, poll_s=1.0, on_progress=lambda status: print(f"{status.done}/{status.total}"))
    for result in results:
        print(result.id, result.value if result.is_good else f"no value: {type(result.error).__name__}")
    assert [result.id for result in results] == list(reviews)

    job = llm.batch_begin(judge, ["Again, please."])
    again = llm.batch_resume(job.reference, judge)  # as any process does that knows where the prefix leads
    again.wait(poll_s=1.0)
    print(again.results())


if __name__ == "__main__":
    main()
