"""Mirascope's first page here: a call, its result type, its stream, another model for a while."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
BOOK = {"title": "Emma", "author": "Jane Austen"}
SCRIPT: list[object] = ["Read Emma.", BOOK, BOOK, "Read Emma."]


class Book(BaseModel):
    title: str
    author: str


@llm.call(MODEL, temperature=0.2, max_tokens=60)
def recommend(genre: str) -> str:
    return f"Recommend a {genre} book."


@llm.call(MODEL, output=Book, max_tokens=60)  # theirs: response_model=Book, or format=Book
def recommend_one(genre: str) -> str:
    return f"Recommend a {genre} book."


def main() -> None:
    print(recommend("fantasy").text)
    book = recommend_one("fantasy").value  # theirs: .parse()
    print(book.title, book.author)
    with recommend_one.stream("crime") as stream:
        for known in stream.partials():  # theirs: .structured_stream()
            print(known)
    with llm.using(MODEL, temperature=0):  # theirs: llm.model(...), llm.override(...), llm.context(...)
        print(recommend("crime").text)


if __name__ == "__main__":
    main()
