"""The loop of an agent in a developer's own three lines; llm.Agent is made of the same."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [tool_call("roll", sides=6), tool_call("roll", sides=20), "A 4, then a 17."]


@llm.tool
def roll(sides: int) -> int:
    """Rolls a die."""
    return {6: 4, 20: 17}.get(sides, 1)


@llm.call(MODEL, tools=[roll], max_tokens=60)
def game(wish: str) -> list[llm.Message]:
    return [llm.system("You roll dice."), llm.user(wish)]


def main() -> None:
    reply = game("A die of 6, and one of 20!")
    while reply.tool_calls and len(reply.messages) < 12:
        reply = reply.resume(reply.run_tools())
    for message in reply.messages:
        print(message.role, [call.name for call in message.tool_calls] or message.content)


if __name__ == "__main__":
    main()
