"""The same as right_beside.py and wrong_beside.py of Anthropic's clients, where the package is installed."""

from __future__ import annotations

from typing import assert_type

from anthropic import Anthropic, AsyncAnthropic

from diptych import llm

from .right_beside import Book


async def wrapped() -> None:
    client = llm.wrap(Anthropic(), model="m")
    assert_type(client, llm.Wrapped)
    assert_type(client.messages.create(response_model=Book, messages=[]), Book)
    later = llm.wrap(AsyncAnthropic())
    assert_type(later, llm.AsyncWrapped)
    assert_type(await later.messages.create(response_model=Book, messages=[]), Book)


def wrong() -> None:
    llm.wrap(Anthropic)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    sync: llm.Wrapped = llm.wrap(AsyncAnthropic())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(sync)
