"""An agent: instructions, tools, dependencies, a typed answer, and limits whose error can be gone on from."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel

from diptych import llm
from diptych.llm.testing import Said, tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    tool_call("stock", item="tea"),
    Said(calls=(("stock", {"item": "rice"}), ("stock", {"item": "salt"}))),
    {"buy": ["rice"]},
]


class Shopping(BaseModel):
    buy: list[str]


def stock(item: str, ctx: llm.Context[dict[str, int]]) -> int:
    """How many of an item there are."""
    return ctx.deps.get(item, 0)


keeper = llm.Agent(
    MODEL,
    name="keeper",
    instructions=lambda ctx: f"Say what must be bought. The shelf knows: {', '.join(ctx.deps)}.",
    tools=[stock],
    output=Shopping,
    deps=dict[str, int],
    limits=llm.Limits(turns=2, tool_calls=20),
    max_tokens=80,
)


def main() -> None:
    shelf = {"tea": 4, "rice": 0, "salt": 9}
    try:
        try:
            run = keeper.run("Is there tea, rice and salt?", deps=shelf)
        except llm.BudgetExceeded as exc:
            print(exc)
            run = keeper.run(state=exc.state, deps=shelf, limits=llm.Limits(turns=10))
    except llm.CallFailed as exc:
        print("no answer:", exc)
        return
    print(run.value.buy, run.spent.tokens, "tokens in", run.state.turns, "turns")
    assert isinstance(run.value, Shopping)


if __name__ == "__main__":
    main()
