"""Portable parameters mean the same everywhere; what one kind of target alone knows is typed under its name.

A parameter that a target has no words for is an error, unless the call says warn or drop; a name that nobody knows is
one where the function is defined, with what is close to it.
"""

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT = ["Once upon a time."]


@llm.call(
    MODEL,
    temperature=0.8,
    max_tokens=30,
    stop=["\n\n"],
    seed=7,
    options={
        "pool": {"min_p": 0.05, "repetition_penalty": 1.1, "priority": -1},
        "openai": {"service_tier": "flex"},  # goes to OpenAI alone
    },
    extra={"metadata": {"from": "an example"}},  # as it is, to whatever target
)
def tale(about: str) -> str:
    return f"The first sentence of a tale about {about}."


def main() -> None:
    print(tale("a heron").text)
    body = tale.request("a heron")
    print({name: value for name, value in body.items() if name != "messages"})

    claude = llm.Registry(keys={"anthropic": "never-sent"})
    with llm.using("anthropic/claude-sonnet-4-5", registry=claude):
        try:
            tale.request("a heron")
        except llm.Unsupported as exc:
            print("refused:", exc)
        print(sorted(tale.with_(on_unsupported="drop").request("a heron")))
    try:
        tale.with_(temprature=1)  # type: ignore[call-arg]
    except llm.UsageError as exc:
        print("refused:", exc)


if __name__ == "__main__":
    main()
