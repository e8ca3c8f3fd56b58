"""A list whose items are worked on as they close, each validated, while the rest is still written."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, Field

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    {"value": [{"name": "Ann", "age": 31}, {"name": "Bob", "age": 29}, {"name": "Eve", "age": 40}]},
]


class Person(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=150)


@llm.call(MODEL, output=list[Person], max_tokens=300)
def people(text: str) -> str:
    return f"Who is in this text? {text}"


def main() -> None:
    stream = people.stream("Ann is 31, Bob two years younger, Eve forty.")
    seen = []
    for person in stream.items():
        print(person.name, person.age)
        seen.append(person)
    assert seen == stream.reply().value


if __name__ == "__main__":
    main()
