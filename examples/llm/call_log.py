"""A log of calls in the form that providers take for fine-tuning: what a large model answers today, a small one can be
taught tomorrow. Failures stay out, and names are taken out before anything is written.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from pydantic import BaseModel

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [{"label": "complaint"}, {"label": "praise"}]


class Label(BaseModel):
    label: str


def redacted(line: dict[str, Any]) -> dict[str, Any]:
    for turn in line["messages"]:
        turn["content"] = turn["content"].replace("Anne", "[name]")
    return line


def main() -> None:
    hooks = llm.Hooks()
    hooks.on(llm.CallEnded, llm.CallLog("calls.jsonl", redact=redacted))

    @llm.call(MODEL, output=Label, hooks=hooks, max_tokens=40)
    def label(text: str) -> str:
        return f"What is this, a complaint or praise? Answer as JSON.\n\n{text}"

    label("The soup was cold. Anne")
    label("The best soup of my life! Anne")
    for line in llm.read_log("calls.jsonl"):
        print(line["messages"])
        assert "Anne" not in str(line)


if __name__ == "__main__":
    main()
