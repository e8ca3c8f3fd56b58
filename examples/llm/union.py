"""One of several types: the answer says which, and the program gets that one."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    {"value": {"kind": "remind", "text": "call Ann", "in_minutes": 30}},
    {"value": {"kind": "search", "words": ["bridge", "1911"]}},
]


class Remind(BaseModel):
    kind: Literal["remind"]
    text: str = Field(max_length=60)
    in_minutes: int = Field(ge=1, le=1440)


class Search(BaseModel):
    kind: Literal["search"]
    words: list[str] = Field(max_length=4)


@llm.call(MODEL, output=Annotated[Remind | Search, Field(discriminator="kind")], max_tokens=200)
def understood(wish: str) -> str:
    return f"What is to be done? {wish}"


def main() -> None:
    for wish in ("Remind me in half an hour to call Ann.", "When was the bridge built?"):
        match understood(wish).value:
            case Remind(text=text, in_minutes=minutes):
                print(f"in {minutes} minutes: {text}")
            case Search(words=words):
                print("look for", *words)


if __name__ == "__main__":
    main()
