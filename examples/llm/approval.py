"""A call that waits for a person, and one whose result comes later: outcomes are values, and nothing blocks."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import Said

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    Said(
        calls=(
            ("transfer", {"to": "Ann", "euros": 5}),
            ("transfer", {"to": "Bob", "euros": 900}),
            ("scan", {"page": 1}),
        )
    ),
    "Ann has her 5 euros, Bob 90, and the page says hello.",
]


@llm.tool(needs_approval=lambda args: args["euros"] > 100)
def transfer(to: str, euros: int) -> str:
    """Sends money."""
    return f"{euros} euros went to {to}"


@llm.tool
def scan(page: int) -> llm.Deferred:
    """Reads a page of paper; somebody must lay it into the scanner first."""
    return llm.Deferred(token=f"scan-{page}")


@llm.call(MODEL, tools=[transfer, scan], max_tokens=80)
def clerk(order: str) -> str:
    return order


def main() -> None:
    reply = clerk("5 euros to Ann, 900 to Bob, and read page 1.")
    outcomes = reply.run_tools()
    decided: dict[str, object] = {}
    results = []
    for one in outcomes:
        if isinstance(one.outcome, llm.NeedsApproval):
            print("may", one.call.name, "run with", one.outcome.args, "? - with a tenth of it")
            decided[one.call.id] = {"args": {**one.call.arguments, "euros": 90}}
        elif isinstance(one.outcome, llm.Deferred):
            results.append(llm.result(one.call.id, f"{one.outcome.token}: hello"))  # perhaps the next day
    if outcomes:
        outcomes = reply.run_tools(approved=decided, done=outcomes)  # what ran does not run again
        print(*(one.outcome for one in outcomes), sep="\n")
        reply = reply.resume([*outcomes, *results], tool_choice="none")
    print(reply.text)


if __name__ == "__main__":
    main()
