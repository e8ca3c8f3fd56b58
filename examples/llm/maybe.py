"""A result that may not be there: the model says why, and nothing is made up."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, Field

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    {"is_known": True, "why": "Ann's age is in the text.", "value": {"name": "Ann", "age": 31}},
    {"is_known": False, "why": "The text is about the weather.", "value": None},
]


class Person(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=150)


@llm.call(MODEL, output=llm.Maybe[Person], max_tokens=200)
def person(text: str) -> str:
    return f"Which person, of which age, is in this text? {text}"


def main() -> None:
    for text in ("Ann is 31.", "It rained all day."):
        try:
            found = person(text).value
        except llm.InvalidOutput as exc:  # a small model may say that it knows, and tell nothing
            print("no answer:", exc.report)
            continue
        print(found.value if found else f"nothing: {found.why}")
        assert bool(found) == (found.value is not None)


if __name__ == "__main__":
    main()
