"""A prompt without a model: for any model and any type of result, with a version that tells changes of it apart."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["Emma, by Jane Austen.", {"title": "Emma", "year": 1815}]


class Book(BaseModel):
    title: str
    year: int


@llm.prompt
def recommend(genre: str) -> list[llm.Message]:
    return [llm.system("You know old books."), llm.user(f"Recommend one book: {genre}.")]


def main() -> None:
    print(recommend("comedy of manners"))  # the messages alone

    in_words = recommend.call(MODEL, max_tokens=60)
    as_book = recommend.call(MODEL, output=Book, max_tokens=60)
    print(in_words("comedy of manners").text)
    print(as_book("comedy of manners").value)

    # The model is no part of a version; what is asked for is.
    assert recommend.call("openai/gpt-5-mini", max_tokens=60).version == in_words.version
    assert as_book.version != in_words.version
    print("versions:", recommend.version, in_words.version, as_book.version)


if __name__ == "__main__":
    main()
