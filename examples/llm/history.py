"""What happened, attempt by attempt: on the reply where there is a value, on the error where there is none."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import ScriptedModel, failure

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["hello"]


@llm.call(MODEL, max_tokens=20)
def greet() -> str:
    return "Say hello."


def main() -> None:
    reply = greet()
    last = reply.attempts[-1]
    print(last.number, last.why, last.model, f"{last.seconds:.3f} s", last.spent.tokens, "tokens", last.request_id)

    busy = ScriptedModel([failure("overloaded"), failure("rate_limited", retry_after_s=0), failure("auth")])
    llm.default_registry().add("busy", busy)
    error: llm.ProviderError | None = None
    try:
        greet.with_("busy/m", retries=llm.Retries(attempts=3, base_s=0))()
    except llm.ProviderError as exc:
        error = exc
    assert error is not None
    assert [attempt.why for attempt in error.attempts] == ["first", "retry", "retry"]
    print(error)
    print("the last failure:", error.failure.kind)


if __name__ == "__main__":
    main()
