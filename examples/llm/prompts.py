"""Four ways to write one prompt: a text or parts, messages, a template, objects. The model sees no difference."""

from __future__ import annotations

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["Try a light oolong.", "An oolong again."]


@llm.call(MODEL, max_tokens=40)
def by_text(drink: str) -> str:
    return f"Recommend a {drink}."


@llm.call(MODEL, max_tokens=40)
def by_messages(drink: str) -> list[llm.Message]:
    return [llm.user(f"Recommend a {drink}.")]


@llm.call(MODEL, max_tokens=40, template=llm.Template("USER: Recommend a {drink}."))
def by_template(drink: str) -> None: ...


@llm.call(MODEL, max_tokens=40)
def by_objects(drink: str) -> llm.Message:
    return llm.Message(role="user", parts=(llm.Text(f"Recommend a {drink}."),))


def main() -> None:
    # request() is what would be sent, without sending it.
    bodies = [form.request("green tea") for form in (by_text, by_messages, by_template, by_objects)]
    assert bodies == [bodies[0]] * 4
    print(bodies[0]["messages"])
    reply = by_template("green tea")
    print(reply.text)

    # A conversation goes on from a reply.
    print(reply.resume("Something stronger, please.").text)


if __name__ == "__main__":
    main()
