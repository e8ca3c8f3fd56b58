"""What type checkers know of wrapped clients, batches and the testing kit; test_llm_types.py has both read it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, assert_type

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from diptych import llm
from diptych.llm.testing import EchoModel, Player, Recorder, ScriptedModel, failure, registry_of, tool_call


class Book(BaseModel):
    title: str


@llm.call("pool/m", output=Book)
def book(topic: str) -> str:
    return topic


@llm.call("pool/m", output=Book)
async def book_later(topic: str) -> str:
    return topic


def wrapped() -> None:
    client = llm.wrap(OpenAI(), model="m", max_retries=llm.Retries())
    assert_type(client, llm.Wrapped)
    assert_type(client.create(response_model=Book, messages=[]), Book)
    assert_type(client.chat.completions.create(response_model=Book, messages=[]), Book)
    assert_type(client.messages.create(response_model=list[Book], messages=[]), list[Book])
    assert_type(client.create(response_model=Book | int, messages=[]), Book | int)
    assert_type(client.create(messages=[]), Any)
    assert_type(client.create_with_completion(response_model=Book, messages=[]), tuple[Book, Any])
    for known in client.create_partial(response_model=Book, messages=[]):
        assert_type(known, llm.Partial[Book] | Book)
    for one in client.chat.completions.create_iterable(response_model=Book, messages=[]):
        assert_type(one, Book)
    for one in client.create_iterable(response_model=list[Book], messages=[]):
        assert_type(one, Book)
    for one in client.create_iterable(response_model=Iterable[Book], messages=[]):
        assert_type(one, Book)
    for number in client.create_iterable(response_model=int, messages=[]):
        assert_type(number, int)


async def wrapped_later() -> None:
    client = llm.wrap(AsyncOpenAI())
    assert_type(client, llm.AsyncWrapped)
    assert_type(await client.create(response_model=Book, messages=[]), Book)
    assert_type(await client.chat.completions.create(response_model=Book, messages=[]), Book)
    assert_type(await client.create_with_completion(response_model=Book, messages=[]), tuple[Book, Any])
    async for known in client.create_partial(response_model=Book, messages=[]):
        assert_type(known, llm.Partial[Book] | Book)
    async for one in client.chat.completions.create_iterable(response_model=Book, messages=[]):
        assert_type(one, Book)


async def batches() -> None:
    results = llm.batch(book, ["x", ("y",), {"topic": "z"}], state_file=Path("job.json"))
    assert_type(results, llm.BatchResults[Book])
    assert_type(results.values, dict[str, Book])
    assert_type(results.by_id("item-0000").value, Book)
    assert_type(results[0].reply, llm.Reply[Book] | None)
    for one in results:
        assert_type(one, llm.BatchResult[Book])
        assert_type(one.error, llm.CallFailed | None)
    assert_type(await llm.batch.aio(book_later, {"a": "x"}), llm.BatchResults[Book])
    job = llm.batch_begin(book, ["x"])
    assert_type(job, llm.BatchJob[Book])
    assert_type(job.wait(poll_s=1.0), llm.BatchStatus)
    assert_type(await job.results.aio(), llm.BatchResults[Book])
    assert_type(llm.batch_resume(job.to_json(), book), llm.BatchJob[Book])
    assert_type(llm.batch_resume(job.reference), llm.BatchJob[str])
    assert_type(llm.batch_list("pool", limit=3), dict[str, llm.BatchStatus])


def kit(tmp_path: Path) -> None:
    model = ScriptedModel(["hello", {"title": "Emma"}, tool_call("add", first=1), failure("rate_limited")])
    assert_type(
        registry_of(pool=model, echo=EchoModel(), tape=Recorder(model, tmp_path / "x"), kept=Player(tmp_path / "x")),
        llm.Registry,
    )
    with llm.using(registry=registry_of(pool=model), temperature=0.0):
        assert_type(book("x").value, Book)
    assert_type(model.requests, list[dict[str, Any]])
