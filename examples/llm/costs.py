"""Costs: of providers by the public table, of own servers by prices that a registry is told. None: unknown; 0: free."""

from __future__ import annotations

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["A haiku.", "A haiku."]


@llm.call(MODEL, max_tokens=20)
def haiku(topic: str) -> str:
    return f"A haiku about {topic}."


def main() -> None:
    reply = haiku("rain")
    print(reply.spent.tokens, "tokens,", "price unknown" if reply.cost is None else f"{reply.cost} dollars")

    registry = llm.default_registry()
    registry.prices = llm.PriceList({MODEL: (0.20, 0.80)})  # or Registry(prices=...): dollars for a million tokens
    reply = haiku("snow")
    assert reply.cost is not None
    assert reply.cost > 0
    print(reply.spent.input_tokens, "tokens in,", reply.spent.output_tokens, "out:", reply.cost, "dollars")
    registry.prices = llm.PriceList({})


if __name__ == "__main__":
    main()
