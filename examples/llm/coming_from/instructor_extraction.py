"""Instructor's first page here, as functions: an extraction, a validator that the model is told of, all attempts."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, ValidationInfo, field_validator

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SOURCE = "Jason is 25 years old. He lives by the sea."
SCRIPT: list[object] = [{"quote": "on a hill"}, {"quote": "by the sea"}]


class Home(BaseModel):
    quote: str

    @field_validator("quote")
    @classmethod
    def stands_there(cls, quote: str, info: ValidationInfo) -> str:
        if info.context is None or quote not in info.context["source"]:
            raise ValueError("these words are not in the source; copy them letter by letter")
        return quote


# theirs: client.create(response_model=Home, max_retries=2, context={"source": SOURCE}, messages=[...])
@llm.call(MODEL, output=Home, retries=llm.Retries(attempts=3), validation={"source": SOURCE}, max_tokens=60)
def home(text: str) -> str:
    return f"Quote the words that say where he lives: {text}"


def main() -> None:
    try:
        reply = home(SOURCE)
        print(reply.value)
        attempts = reply.attempts
    except llm.InvalidOutput as exc:  # theirs: InstructorRetryException
        print(exc.report)
        attempts = exc.attempts  # theirs: failed_attempts
    for attempt in attempts:
        print(attempt.number, attempt.why, attempt.text, attempt.spent.tokens, "tokens")


if __name__ == "__main__":
    main()
