"""A cache: an equal call is not made again. Equal is everything that an answer depends on, the key included."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [{"name": "Paris"}, {"name": "Rome"}, {"name": "Paris"}]


class City(BaseModel):
    name: str


def main() -> None:
    with llm.Cache("answers.db", ttl_s=3600) as cache:  # without a path, in memory

        @llm.call(MODEL, output=City, cache=cache, temperature=0, max_tokens=30)
        def capital(country: str) -> str:
            return f"The capital of {country}, as JSON."

        first, again = capital("France"), capital("France")
        assert again.is_cached
        assert again.value == first.value
        print(again.value, "cost", again.cost, "and saved", again.saved.tokens, "tokens")
        assert not capital("Italy").is_cached  # another prompt
        assert not capital.with_(cache=False)("France").is_cached  # without it, for once
        print(cache.hits, "hit,", cache.misses, "misses,", cache.num_bytes, "bytes")


if __name__ == "__main__":
    main()
