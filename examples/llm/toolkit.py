"""Tools that come together, wrapped into others: renamed, left out, behind a person's approval, within a time."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [tool_call("north_find", title="Emma"), "The north branch has it."]


class Library:
    def __init__(self, name: str, books: list[str]) -> None:
        self.name = name
        self.books = books

    @llm.tool
    def find(self, title: str) -> bool:
        """Whether the library {self.name} has a book."""
        return title in self.books

    @llm.tool
    def lend(self, title: str) -> str:
        """Lends it."""
        self.books.remove(title)
        return f"{title} is yours"

    @llm.tool
    def burn(self, title: str) -> None:
        """Not for models."""


def kit_of(library: Library) -> llm.Toolkit:
    kit = llm.Toolkit(library).filtered(lambda one: one.name != "burn")
    return kit.approving(lambda one: one.name == "lend").with_timeout(5).prefixed(f"{library.name}_")


NORTH, SOUTH = Library("north", ["Emma"]), Library("south", ["Persuasion"])


@llm.call(MODEL, tools=[kit_of(NORTH) + kit_of(SOUTH)], max_tokens=60)
def ask(question: str) -> str:
    return question


def main() -> None:
    for one in kit_of(NORTH) + kit_of(SOUTH):
        print(one.name, "|", one.description, "|", "needs approval" if one.needs_approval else "runs")
    reply = ask("Which branch has Emma?")
    if reply.tool_calls:
        refused = {one.id: False for one in reply.tool_calls if "lend" in one.name}
        reply = reply.resume(reply.run_tools(approved=refused))
    print(reply.text)


if __name__ == "__main__":
    main()
