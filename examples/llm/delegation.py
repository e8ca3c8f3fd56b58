"""An agent as a tool of another: its parameters are a type's fields, and what it spends counts above."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel

from diptych import llm
from diptych.llm.testing import tool_call

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    tool_call("translator", text="Good morning", language="French"),
    "Bonjour",
    "In France you say Bonjour.",
]


class Work(BaseModel):
    text: str
    language: str = "French"


translator = llm.Agent(
    MODEL,
    name="translator",
    instructions="Translate, and say nothing else.",
    limits=llm.Limits(turns=2),
    max_tokens=40,
)

guide = llm.Agent(
    MODEL,
    name="guide",
    instructions="You help travellers. Leave translations to the translator.",
    tools=[
        translator.as_tool(
            input=Work,
            description="Translates a text.",
            prompt=lambda work: f"Into {work.language}: {work.text}",
        )
    ],
    limits=llm.Limits(turns=6),
    max_tokens=60,
)


def main() -> None:
    try:
        run = guide.run("What do people say in the morning in France?")
        print(run.value, "-", run.spent.requests, "requests, the translator's included")
    except llm.CallFailed as exc:
        print("no answer:", exc)


if __name__ == "__main__":
    main()
