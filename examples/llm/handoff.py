"""A conversation that goes to another agent: the model calls transfer_to_NAME, the history stays, the session too."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    tool_call("transfer_to_billing", reason="a refund"),
    "I have sent your money back.",
    "You are welcome.",
]

billing = llm.Agent(
    MODEL,
    name="billing",
    description="Refunds and invoices.",
    instructions="You are billing. Be brief.",
    max_tokens=40,
)
desk = llm.Agent(
    MODEL,
    name="desk",
    instructions="You are the front desk. Hand questions of money to billing.",
    handoffs=[llm.Handoff(agent=billing, filter=llm.without_tool_turns)],
    limits=llm.Limits(turns=5),
    max_tokens=40,
)


def main() -> None:
    try:
        run = desk.run("I want my money back!")
    except llm.BudgetExceeded as exc:
        print(exc)
        return
    print(f"{run.agent}: {run.value}")
    again = desk.run("Thank you!", state=run.state)  # whoever has it goes on
    print(f"{again.agent}: {again.value}")
    assert again.agent == run.agent or again.agent == "billing"
    assert again.state.session == run.state.session


if __name__ == "__main__":
    main()
