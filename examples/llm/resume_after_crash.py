"""A run that goes on after its process ended: the state is kept after each step, and no tool that ran runs again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [tool_call("pay", euros=7), "Paid 7 euros."]
paid: list[int] = []


class PowerCut(Exception):
    """Stands for whatever ends a process."""


@llm.tool
def pay(euros: int) -> str:
    """Pays."""
    paid.append(euros)
    return f"paid {euros}"


cashier = llm.Agent(MODEL, name="cashier", tools=[pay], limits=llm.Limits(turns=4), max_tokens=40)


def main() -> None:
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "run.json"

        def keep(state: llm.AgentState) -> None:
            part = kept.with_suffix(".part")
            part.write_text(state.to_json())
            part.replace(kept)  # whole, or not at all
            if state.answered:
                raise PowerCut

        try:
            run = cashier.run("Pay 7 euros.", on_step=keep)
        except PowerCut:
            print("the process ends; another one goes on")
            try:
                run = cashier.run(state=llm.AgentState.from_json(kept.read_text()))
            except llm.BudgetExceeded as exc:
                print(exc)
                return
        print(run.text, "- paid:", paid)
        assert run.state.tool_calls == len(paid)


if __name__ == "__main__":
    main()
