"""One conversation gone on several ways at once: all begin with the same messages, in one session."""

from __future__ import annotations

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["A lighthouse keeper finds a map.", "He burns it.", "He sails away.", "He sells it."]


@llm.call(MODEL, session="story", seed=1, temperature=1.0, max_tokens=40)
def story(about: str) -> str:
    return f"One sentence that begins a story about {about}."


def main() -> None:
    begun = story("a lighthouse")
    print(begun.text)
    endings = begun.fork(3, "And how does it end? One sentence.")
    for reply in endings:
        print("-", reply.text, f"({reply.usage.cache_read_tokens or 0} tokens were there already)")
    assert len(endings) == 3
    assert len({reply.draft.params["seed"] for reply in endings}) == 3


if __name__ == "__main__":
    main()
