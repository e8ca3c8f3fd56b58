"""On an own cluster one wrong field is made anew: what stands before it is forced through the grammar, and the model
writes the field and what follows.
"""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, field_validator

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ['{"name":"Ann","email":"ann","age":31}', '"ann@example.com","age":31}']


class Person(BaseModel):
    name: str
    email: str
    age: int

    @field_validator("email")
    @classmethod
    def has_at(cls, email: str) -> str:
        if "@" not in email:
            raise ValueError("an address has an @ in it, for example ann@example.com")
        return email


@llm.call(MODEL, output=Person, max_tokens=100)
def person(text: str) -> str:
    return f"Who is this? {text}"


def main() -> None:
    try:
        reply = person("Ann is 31; write to ann@example.com.")
    except llm.CallFailed as exc:
        print(exc)
        return
    print(reply.value)
    for attempt in reply.attempts:
        print(attempt.number, attempt.why, attempt.spent.output_tokens, "tokens written:", attempt.text)


if __name__ == "__main__":
    main()
