"""A function that returns a prompt is a call of a model: the reply has the text, and everything else that was told.

python examples/llm/hello.py pool/smollm2-135m-instruct
"""

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT = ["Bern.", "It lies on the Aare."]


@llm.call(MODEL, max_tokens=40)
def capital(country: str) -> str:
    return f"What is the capital of {country}? One short sentence."


def main() -> None:
    reply = capital("Switzerland")
    print(reply.text)
    print(f"{reply.usage.output_tokens} tokens, ended by {reply.finish}, from {reply.model}")

    for piece in capital.stream("Switzerland").text():  # the same function, as it comes
        print(piece, end="", flush=True)
    print()
    print(capital.request("Norway"))  # exactly what would be sent


if __name__ == "__main__":
    main()
