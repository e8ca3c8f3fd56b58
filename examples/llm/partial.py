"""A result that is shown while it comes: what is not known yet is UNSET, and a part that is complete says so."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, Field

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [{"title": "Soup", "minutes": 30, "steps": ["Cut the onions.", "Boil the water.", "Wait."]}]


class Recipe(BaseModel):
    title: str = Field(max_length=40)
    minutes: int = 20
    steps: list[str] = Field(max_length=5)


@llm.call(MODEL, output=Recipe, max_tokens=300)
def recipe(of: str) -> str:
    return f"How does one make {of}?"


def main() -> None:
    stream = recipe.stream("onion soup")
    for partial in stream.partials():
        minutes = "?" if partial.minutes is llm.UNSET else partial.minutes  # never the default before it is said
        num_steps = 0 if partial.steps is llm.UNSET else len(partial.steps)
        print(f"{partial.title or ''!r}, {minutes} minutes, {num_steps} steps", partial.is_final("/title"))
        if partial.is_final("/steps/0"):
            print("  begin with:", partial.steps[0])
    assert partial.to_dict()["title"] == stream.reply().value.title


if __name__ == "__main__":
    main()
