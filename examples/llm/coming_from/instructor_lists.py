"""Instructor's lists, unions and Maybe here: objects as they close, one of several types, and nothing made up."""

from __future__ import annotations

import os
import sys
from typing import Literal

from pydantic import BaseModel

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    {"value": [{"kind": "person", "name": "Ann"}, {"kind": "place", "city": "Oslo"}]},
    {"is_known": False, "why": "nobody's age is told", "value": None},
]


class Person(BaseModel):
    kind: Literal["person"]
    name: str


class Place(BaseModel):
    kind: Literal["place"]
    city: str


@llm.call(MODEL, output=list[Person | Place], max_tokens=120)  # theirs: create_iterable(response_model=Person | Place)
def found(text: str) -> str:
    return f"Which people and places are in this text? {text}"


@llm.call(MODEL, output=llm.Maybe[int], max_tokens=80)  # theirs: response_model=Maybe(...)
def age(text: str) -> str:
    return f"How old is Ann? {text}"


def main() -> None:
    text = "Ann went to Oslo."
    for one in found.stream(text).items():
        print(one)
    known = age(text).value
    print(known.value if known else f"unknown: {known.why}")


if __name__ == "__main__":
    main()
