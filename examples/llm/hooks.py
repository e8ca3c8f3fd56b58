"""Hooks: what happens in calls is told to whoever asks, here to a log and to a count of tokens."""

from __future__ import annotations

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["Hello, Ada.", "Good day, Ada."]


@llm.call(MODEL, max_tokens=30)
def greet(name: str) -> str:
    return f"Greet {name} in one short sentence."


def main() -> None:
    tokens: list[int] = []

    def began(event: llm.RequestBegan) -> None:
        print(f"attempt {event.number} ({event.why}) goes out with {len(event.body['messages'])} messages")

    def failed(event: llm.AttemptFailed) -> None:
        print("failed:", event.attempt.error, "and that was the last" if event.is_last else f"next: {event.next_why}")

    def ended(event: llm.CallEnded) -> None:
        tokens.append(sum(attempt.spent.tokens for attempt in event.attempts))

    hooks = llm.Hooks()  # of one call; `llm.on(...)` hears all calls of the process
    hooks.on(llm.RequestBegan, began)
    hooks.on(llm.AttemptFailed, failed)
    stop = hooks.on(llm.CallEnded, ended)
    print(greet.with_(hooks=hooks)("Ada").text)
    stop()
    print(greet.with_(hooks=hooks)("Ada").text)
    assert len(tokens) == 1
    print(tokens[0], "tokens in the call that was counted")


if __name__ == "__main__":
    main()
