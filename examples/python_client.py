"""Diptych's own client: a whole answer, a streamed one, several at once. Run it beside `make serve`.

python examples/python_client.py [URL]      without one: the cluster started last on this machine
"""

from __future__ import annotations

import asyncio
import sys

import diptych
from diptych.protos.errors import RequestError


def one_after_the_other(url: str | None) -> None:
    with diptych.connect(url) as client:
        for card in client.models():
            print(f"{card.name}: {card.max_context_tokens} tokens of context")

        answer = client.chat("What is the capital of France?", temperature=0, max_tokens=24, explain=True)
        print(f"{answer.text}  [{answer.completion_tokens} tokens]")
        assert answer.explanation is not None
        (told,) = answer.explanation["choices"]
        print(f"first token after {told['ttft_s']:.3f} s; prompt on {told['prefill_engine'] or told['decode_engine']}")

        for delta in client.stream_chat("Name three colours.", temperature=0, max_tokens=24):
            print(delta.text, end="", flush=True)
        print()

        try:
            client.complete("hello", temperature=9)
        except RequestError as error:
            print(f"refused: {error}")


async def at_once(url: str | None) -> None:
    async with diptych.connect_async(url) as client:
        countries = ("Italy", "Spain", "Japan")
        questions = [f"What is the capital of {country}?" for country in countries]
        answers = await asyncio.gather(*(client.chat(q, temperature=0, max_tokens=16) for q in questions))
        for country, answer in zip(countries, answers, strict=True):
            print(f"{country}: {answer.text}")


if __name__ == "__main__":
    server = sys.argv[1] if len(sys.argv) > 1 else None
    one_after_the_other(server)
    asyncio.run(at_once(server))
