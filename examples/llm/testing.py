"""How a program's own tests answer its calls: scripts, echoes, failures, and no real model by accident.

Needs no model. In a test file these are the bodies of tests.
"""

from pydantic import BaseModel

from diptych import llm
from diptych.llm.testing import EchoModel, NetworkForbidden, ScriptedModel, failure, forbid_network, registry_of

SCRIPT: list[object] = []  # its models are its own


class Ticket(BaseModel):
    title: str
    urgent: bool


@llm.call("pool/any", output=Ticket, retries=llm.Retries(attempts=3, base_s=0.0))
def triage(mail: str) -> str:
    return f"Make a ticket of this mail:\n{mail}"


def main() -> None:
    # What the model says is written down; each request takes the next entry.
    model = ScriptedModel([failure("overloaded"), {"title": "no light"}, {"title": "no light", "urgent": True}])
    with llm.using(registry=registry_of(pool=model)):
        reply = triage("The light is out.")
    print(reply.value, [attempt.why for attempt in reply.attempts])
    assert reply.value.urgent
    assert "urgent: Field required" in model.requests[2]["messages"][-1]["content"]  # the model was told of its error

    # No script: a typed call gets the smallest value of its type, any other the question.
    with llm.using(registry=registry_of(pool=EchoModel())):
        print(triage("whatever").value)

    # A real model is never reached by accident.
    with forbid_network(), llm.using("openai/gpt-6-luna", registry=llm.Registry(keys={"openai": "k"})):
        try:
            triage("whatever")
        except NetworkForbidden as exc:
            print("refused:", exc)


if __name__ == "__main__":
    main()
