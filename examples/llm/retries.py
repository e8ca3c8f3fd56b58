"""What follows a failure: attempts count the first one, the model is told which field is wrong, and an error that is
left in the end tells the whole story.
"""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, field_validator

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [{"title": "Emma", "year": 2015}, {"title": "Emma", "year": 1815}]


class Novel(BaseModel):
    title: str
    year: int

    @field_validator("year")
    @classmethod
    def old(cls, year: int) -> int:
        if year > 1900:
            raise ValueError(f"{year} is not of the 19th century: name an older novel")
        return year


@llm.call(MODEL, output=Novel, retries=llm.Retries(attempts=3, repair=False), max_tokens=100)
def novel(country: str) -> str:
    return f"A novel of the 19th century from {country}, as JSON."


def main() -> None:
    try:
        reply = novel("England")
    except llm.CallFailed as exc:
        print(exc)  # a line for each attempt
        print("the last answer was:", exc.text)
        return
    print(reply.value.title, reply.value.year)
    for attempt in reply.attempts:
        print(attempt)
    assert len(reply.attempts) <= 3


if __name__ == "__main__":
    main()
