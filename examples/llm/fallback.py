"""Other models for when one cannot answer: each has attempts of its own, and begins with the call's own messages."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import ScriptedModel, failure

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["The sea is blue."]


def main() -> None:
    registry = llm.default_registry()
    registry.add("away", ScriptedModel([failure("quota")]))  # stands for a provider that is paid for no more

    @llm.call("away/big", retries=llm.Retries(fallback=[MODEL]), max_tokens=30)
    def describe(thing: str) -> str:
        return f"Say one short sentence about {thing}."

    reply = describe("the sea")
    print(reply.text)
    for attempt in reply.attempts:
        print(attempt)
    assert reply.model == MODEL  # and a reply.resume(...) stays with it
    assert [attempt.why for attempt in reply.attempts][:2] == ["first", "fallback"]


if __name__ == "__main__":
    main()
