"""Facts with quotes that stand in the source: the validator gets the source as its context, apart from the prompt."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SOURCE = "The bridge was built in 1911. It was closed for repairs in the spring of 1987, and opened again in June."
SCRIPT: list[object] = [
    {"facts": [{"quote": "The bridge was built in 1912.", "statement": "It is from 1912."}]},
    {"facts": [{"quote": "The bridge was built in 1911.", "statement": "It is from 1911."}]},
]


class Fact(BaseModel):
    quote: str = Field(description="copied word by word from the text", max_length=120)
    statement: str = Field(max_length=120)

    @field_validator("quote")
    @classmethod
    def in_source(cls, quote: str, info: ValidationInfo[dict[str, str]]) -> str:
        if quote not in info.context["source"]:
            raise ValueError("this quote does not stand in the text: copy it word by word")
        return quote


class Answer(BaseModel):
    facts: list[Fact] = Field(min_length=1, max_length=3)


@llm.call(MODEL, output=Answer, validation={"source": SOURCE}, max_tokens=300)
def ask(question: str) -> str:
    return f"{question} Answer from this text alone, with quotes.\n\n{SOURCE}"


def main() -> None:
    try:
        reply = ask("When was the bridge built?")
    except llm.InvalidOutput as exc:
        print("no quote stands in the text:", *exc.report.paths)
        return
    for fact in reply.value.facts:
        assert fact.quote in SOURCE
        print(f'{fact.statement} "{fact.quote}"')
    print("attempts:", len(reply.attempts))


if __name__ == "__main__":
    main()
