"""Mirascope's loop over tools here: the same three lines, or an agent with limits around them."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
CALL = tool_call("shelf_of", title="Emma")
SCRIPT: list[object] = [CALL, "Emma is on shelf 3.", CALL, "Emma is on shelf 3."]


@llm.tool
def shelf_of(title: str, floor: int = 1) -> str:
    """Where a book stands.

    Args:
        title: as it stands on the book
        floor: of the library
    """
    return f"{title}: floor {floor}, shelf 3"


@llm.call(MODEL, tools=[shelf_of], max_tokens=80)
def librarian(question: str) -> str:
    return question


def main() -> None:
    reply = librarian("Where is Emma?")
    for _ in range(5):  # theirs: while response.tool_calls
        if not reply.tool_calls:
            break
        reply = reply.resume(reply.run_tools())  # theirs: response.resume(response.execute_tools())
    print(reply.text)

    agent = llm.Agent(MODEL, name="librarian", tools=[shelf_of], limits=llm.Limits(turns=5), max_tokens=80)
    print(agent.run("Where is Emma?").value)


if __name__ == "__main__":
    main()
