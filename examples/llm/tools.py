"""A function that a model may call: type hints become its schema, the docstring its words, arguments arrive typed."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from typing import Annotated, Literal

from pydantic import Field

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    tool_call("forecast", city="Oslo", day="2026-11-24"),
    "Take an umbrella.",
]


@llm.tool(timeout=5)
def forecast(
    city: str,
    day: dt.date,
    days: Annotated[int, Field(ge=1, le=7)] = 1,
    unit: Literal["celsius", "fahrenheit"] = "celsius",
) -> dict[str, str]:
    """Tells the weather.

    Args:
        city: where, without the country
        day: the first day
        days: how many of them
    """
    return {"city": city, "weekday": f"{day:%A}", "sky": "rain", "unit": unit, "days": str(days)}


@llm.call(MODEL, tools=[forecast], max_tokens=80)
def advise(question: str) -> str:
    return question


def main() -> None:
    print(json.dumps(forecast.told(), indent=1))
    print(forecast("Bergen", dt.date(2026, 11, 24)))  # the function itself, as ever

    reply = advise("Do I need an umbrella in Oslo tomorrow? Today is 2026-11-23.")
    if reply.tool_calls:
        outcomes = reply.run_tools()
        for one in outcomes:
            print(one.call.name, one.call.arguments, "->", one.outcome)
        reply = reply.resume(outcomes, tool_choice="none")
    print(reply.text)


if __name__ == "__main__":
    main()
