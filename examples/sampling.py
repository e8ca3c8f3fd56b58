"""How tokens are chosen: alternatives with their probabilities, several answers to one prompt, penalties, scores.

python examples/sampling.py [URL]      without one: the cluster started last on this machine
"""

from __future__ import annotations

import math
import sys

import diptych
from diptych.cluster.client import Answer, Client


def share(logprob: float) -> str:
    return f"{math.exp(logprob):.0%}"


def show_alternatives(answer: Answer) -> None:
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    for token in logprobs["content"]:
        others = ", ".join(f"{o['token']!r} {share(o['logprob'])}" for o in token["top_logprobs"])
        print(f"{token['token']!r} {share(token['logprob'])}  of  {others}")


def score(client: Client, text: str) -> float:
    """The logarithm of the probability that the model gives a text: nothing is generated."""
    answer = client.complete(text, max_tokens=0, echo=True, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    return math.fsum(logprobs["token_logprobs"][1:])


def main() -> None:
    with diptych.connect(sys.argv[1] if len(sys.argv) > 1 else None) as client:
        question = "What is the capital of France?"
        show_alternatives(client.chat(question, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3))

        answer = client.complete("Once upon a time", n=3, seed=7, temperature=0.9, min_p=0.05, max_tokens=12)
        for choice in answer.choices:
            print(f"{choice.index}: {choice.text!r}")

        repeated = client.complete("la la la la", temperature=0, max_tokens=12).text
        varied = client.complete(
            "la la la la", temperature=0, max_tokens=12, repetition_penalty=1.3, frequency_penalty=0.5, bad_words=["la"]
        ).text
        print(f"plain: {repeated!r}\nwith penalties: {varied!r}")

        for text in ("The sky is blue.", "The sky is seven."):
            print(f"{text!r} scores {score(client, text):.1f}")


if __name__ == "__main__":
    main()
