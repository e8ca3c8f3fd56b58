"""Values in the wrong clothes: with strict=False "25" is taken for 25, and for one call with a validator for lists."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, Field, field_validator

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [
    {"name": "Ann", "age": "25", "is_member": "yes", "tags": "red, blue"},
    {"name": "Ann", "age": "25", "is_member": "yes", "tags": "red, blue"},
]


class Row(BaseModel):
    name: str = Field(max_length=30)
    age: int
    is_member: bool
    tags: list[str] = Field(max_length=4)

    @field_validator("tags", mode="before")
    @classmethod
    def split(cls, tags: object) -> object:
        return [tag.strip() for tag in tags.split(",")] if isinstance(tags, str) else tags


@llm.call(MODEL, output=Row, strict=False, max_tokens=200)
def lax(text: str) -> str:
    return f"As a row: {text}"


@llm.call(MODEL, output=Row, retries=llm.Retries(attempts=1), max_tokens=200)
def strict(text: str) -> str:
    return f"As a row: {text}"


def main() -> None:
    row = lax("Ann, 25, member, likes red and blue").value
    assert isinstance(row.age, int)
    print(row)
    try:
        print(strict("Ann, 25, member, likes red and blue").value)
    except llm.InvalidOutput as exc:
        print(exc.report)


if __name__ == "__main__":
    main()
