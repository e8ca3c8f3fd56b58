"""A run that waits for a person: its state is JSON, and goes on in another process when there is an answer."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import Said

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    Said(calls=(("send", {"to": "Ann", "text": "hi"}), ("delete", {"path": "old"}), ("survey", {}))),
    "Ann is told, attic/old is gone, and 7 of 10 like it.",
]


@llm.tool
def send(to: str, text: str) -> str:
    """Sends a message."""
    print("sent once:", to, text)
    return "sent"


@llm.tool(needs_approval=True)
def delete(path: str) -> str:
    """Deletes."""
    return f"{path} is deleted"


@llm.tool
def survey() -> llm.Deferred:
    """Asks people, which takes days."""
    return llm.Deferred(token="survey-12")


clerk = llm.Agent(MODEL, name="clerk", tools=[send, delete, survey], limits=llm.Limits(turns=4), max_tokens=60)
changed = {"args": {"path": "attic/old"}}  # or True, or False


def main() -> None:
    try:
        run = clerk.run("Tell Ann hi, delete old, and ask the people.")
        kept = run.state.to_json()
        if not run.is_done:
            for one in run.pending:
                print("waits:", one.tool, dict(one.arguments), one.kind, one.token)
            run = clerk.run(
                state=llm.AgentState.from_json(kept),
                approvals={one.call_id: changed for one in run.pending if one.kind == "approval"},
                results={one.call_id: "7 of 10" for one in run.pending if one.kind == "result"},
            )
        print(run.text)
    except llm.BudgetExceeded as exc:
        print(exc)


if __name__ == "__main__":
    main()
