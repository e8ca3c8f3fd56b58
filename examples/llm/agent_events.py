"""What an agent does, as typed events while it does it."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [tool_call("weather", city="Oslo"), "Take a coat: it snows in Oslo."]


@llm.tool
def weather(city: str) -> str:
    """Of a city."""
    return f"snow in {city}"


guide = llm.Agent(MODEL, name="guide", tools=[weather], limits=llm.Limits(turns=4), max_tokens=60)


def main() -> None:
    with guide.stream("What do I wear in Oslo?") as stream:
        try:
            for event in stream:
                match event:
                    case llm.TurnBegan(agent, turn):
                        print(f"[{agent}, turn {turn}]")
                    case llm.TextDelta(_, text):
                        print(text, end="", flush=True)
                    case llm.ToolBegan(_, call):
                        print(f"  {call.name}({call.text})")
                    case llm.ToolEnded(_, outcome):
                        print(f"  -> {outcome.outcome}")
                    case llm.RunEnded(run):
                        print(f"\n{run.spent.tokens} tokens in {run.state.turns} turns")
        except llm.BudgetExceeded as exc:
            print(exc)


if __name__ == "__main__":
    main()
