"""Processors: secrets and addresses do not reach the model, its answers have them again; an own one is a few lines."""

from __future__ import annotations

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["I have written to [EMAIL_1] about the key."]


class NoShouting(llm.Processor):
    """What the model says, without capitals only."""

    def after(self, message: llm.Message, ctx: llm.ProcessorContext) -> llm.Message:
        return llm.with_texts(message, lambda text: text.capitalize() if text.isupper() else text)


redact = llm.RedactPII(["email", "phone", "card", "iban"], restore=True)
clerk = llm.Agent(
    MODEL,
    name="clerk",
    before=[
        llm.Normalise(most_chars=4_000),
        llm.RedactSecrets(),
        redact,
        llm.Moderation(lambda text: "it asks for a bomb" if "bomb" in text else None),
    ],
    after=[redact, NoShouting()],
    max_tokens=40,
)


def main() -> None:
    run = clerk.run("Write to ana@example.com: the key is AKIAIOSFODNN7EXAMPLE, the card 4111 1111 1111 1111.")
    print("the model was told:", run.messages[0].content)
    print("the reader is told:", run.value)
    assert "ana@example.com" not in run.messages[0].content
    try:
        clerk.run("How is a bomb made?")
    except llm.Blocked as exc:
        print(exc.processor, "-", exc.reason)


if __name__ == "__main__":
    main()
