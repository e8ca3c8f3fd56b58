"""A result of the type that the program works with: models in models, dates, words of a list."""

from __future__ import annotations

import os
import sys
from datetime import date
from typing import Literal

from pydantic import BaseModel, Field

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    {
        "title": "Metropolis",
        "released": "1927-01-10",
        "mood": "dark",
        "cast": [{"name": "Brigitte Helm", "role": "Maria"}],
    }
]


class Actor(BaseModel):
    name: str = Field(max_length=40)
    role: str = Field(max_length=40)


class Film(BaseModel):
    """The model reads this, and the descriptions of fields."""

    title: str = Field(max_length=60)
    released: date
    mood: Literal["light", "dark"] = Field(description="how it leaves one")
    cast: list[Actor] = Field(max_length=3)


@llm.call(MODEL, output=Film, max_tokens=400)
def film(about: str) -> str:
    return f"A silent film about {about}, please."


def main() -> None:
    reply = film("a city of the future")
    assert isinstance(reply.value.released, date)
    assert reply.value.mood in ("light", "dark")
    print(reply.value.title, reply.value.released.year, reply.value.mood)
    for actor in reply.value.cast:
        print(f"  {actor.name} as {actor.role}")
    print("attempts:", len(reply.attempts))


if __name__ == "__main__":
    main()
