"""The most that a call may use over all its attempts, failed ones included: tokens, dollars, seconds."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from pydantic import BaseModel, field_validator

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [{"number": 4}]


class Never(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def refused(cls, number: int) -> NoReturn:
        raise ValueError(f"{number} is not good enough")


@llm.call(
    MODEL,
    output=Never,
    retries=llm.Retries(attempts=100),
    budget=llm.Budget(tokens=10, seconds=60),
    max_tokens=30,
)
def guess() -> str:
    return "Guess a number."


def main() -> None:
    error: llm.BudgetExceeded | None = None
    try:
        guess()
    except llm.BudgetExceeded as exc:
        error = exc
    assert error is not None
    assert error.limit == "tokens"
    print(error)
    print("used:", error.attempts[0].spent.tokens, "tokens; the last answer:", error.text)


if __name__ == "__main__":
    main()
