"""One function, other models: for one call, for a block, for a tenant with keys of its own.

What is nearer to the call holds: the registry's params, then those of @llm.call, then with_, then using. Blocks may lie
in blocks; behind a block holds what held before it, in this thread or task alone.
"""

import os
import sys

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT = ["red", "blue", "green", "grey", "white"]


@llm.call(MODEL, temperature=1.0, max_tokens=10)
def color(mood: str) -> str:
    return f"A color for somebody who is {mood}, one word."


def tenant(name: str) -> llm.Registry:
    """Where a tenant's models are, with its key; two of them never share a connection or a key."""
    found = llm.Registry(clusters={"pool": llm.Cluster(tenant=name)}, params={"temperature": 0.0})
    if MODEL.startswith("pool/"):
        found.add("pool", llm.default_registry().resolve(MODEL)[0])  # the examples have one cluster for all
    return found


def main() -> None:
    print("as it stands:", color("glad").text)
    print("another call:", color.with_(temperature=0.0, seed=1)("glad").text)
    with llm.using(MODEL, temperature=0.2):
        print("in a block:  ", color("calm").text)
        with llm.using(temperature=None):  # None: not sent, whatever lies below says
            print("inside it:   ", color("calm").text)
            assert "temperature" not in color.request("calm")
    with llm.using(registry=tenant("ada")):
        print("for a tenant:", color("tired").text)


if __name__ == "__main__":
    main()
