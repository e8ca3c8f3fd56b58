"""Forms that are no JSON, on an own cluster: a pattern, a choice, a grammar. No token outside them can be said.

A result type is a form, too: with output=... the schema is held to in the same way.
"""

from __future__ import annotations

import os
import re
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["2026-11-23", "no", "12+7-3"]
SUM = 'start: NUMBER (("+" | "-") NUMBER){1,3}\nNUMBER: /[1-9][0-9]?/'


@llm.call(MODEL, options={"pool": {"guided_regex": "20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"}})
def day(event: str) -> str:
    return f"On which day was {event}? Year, month, day."


@llm.call(MODEL, options={"pool": {"guided_choice": ["yes", "no"]}})
def answer(question: str) -> str:
    return question


@llm.call(MODEL, max_tokens=40, options={"pool": {"guided_grammar": SUM}})
def exercise(about: str) -> str:
    return f"An exercise in {about}, please, without its result."


def main() -> None:
    when = day("the last full moon").text
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", when)
    print(when)
    said = answer("Is the sky green?").text
    assert said in ("yes", "no")
    print(said)
    total = exercise("adding").text
    assert re.fullmatch(r"[0-9+-]+", total)
    print(total)


if __name__ == "__main__":
    main()
