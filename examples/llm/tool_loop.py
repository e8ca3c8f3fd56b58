"""The loop of an agent is three lines of your own: tools run at once, and what goes wrong is told to the model."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass

from diptych import llm
from diptych.llm.testing import Said, tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    Said(calls=(("stock", {"item": "tea"}), ("stock", {"item": "cake"}), ("price", {"item": "tea", "count": "two"}))),
    tool_call("price", item="tea", count=2),
    "Two teas are 5.00; there is no cake.",
]


@dataclass
class Shop:
    stock: dict[str, int]


def stock(item: str, ctx: llm.Context[Shop]) -> int:
    """How many there are."""
    if item not in ctx.deps.stock:
        raise llm.Failed(f"we never had any {item}")
    return ctx.deps.stock[item]


async def price(item: str, count: int) -> str:
    """What they cost together."""
    if count > 10:
        raise llm.Retry("at most 10 at a time")
    await asyncio.sleep(0)  # a look at a price list, somewhere
    return f"{count * 2.5:.2f}"


@llm.call(MODEL, tools=[stock, price], deps=Shop({"tea": 4}), max_tokens=80)
def sell(wish: str) -> list[llm.Message]:
    return [llm.system("You sell tea and cake."), llm.user(wish)]


def main() -> None:
    reply, turns = sell("Two teas and a cake, please."), 0
    while reply.tool_calls and turns < 5:
        outcomes = reply.run_tools()
        print(*(f"{one.call.name}{one.call.arguments}: {one.outcome}" for one in outcomes), sep="\n")
        reply, turns = reply.resume(outcomes), turns + 1
    print(reply.text, reply.spent)


if __name__ == "__main__":
    main()
