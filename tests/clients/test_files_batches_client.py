"""The official Python client's files and batches, sync and async: every method, every field that it sends or reads.

Guards against objects that curl can read and the client cannot, pages that never end, and forms that it alone sends.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fences import URL, of_kind
from openai.types import Batch, FileObject

pytestmark = pytest.mark.slow

CHAT: Any = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")
WAIT_S = 60


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def waiting(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
        yield made


def rows(number: int, url: str = CHAT, **more: Any) -> bytes:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, **more}
    lines = [{"custom_id": f"c{i}", "method": "POST", "url": url, "body": body} for i in range(number)]
    return "\n".join(map(json.dumps, lines)).encode()


def until_over(client: openai.OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + WAIT_S
    while (batch := client.batches.retrieve(batch.id)).status not in OVER:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def test_a_file_has_all_its_verbs(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"some text\n" * 1000)
    made = client.files.create(file=path, purpose="user_data", expires_after={"anchor": "created_at", "seconds": 7200})
    assert isinstance(made, FileObject)
    assert (made.filename, made.bytes, made.purpose) == ("notes.txt", 10_000, "user_data")
    assert made.expires_at == made.created_at + 7200
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == path.read_bytes()
    with client.files.with_streaming_response.content(made.id) as reply:
        assert b"".join(reply.iter_bytes()) == path.read_bytes()
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve(made.id)
    assert refused.value.code == "file_not_found"
    with pytest.raises(openai.BadRequestError, match="fine-tune"):
        client.files.create(file=path, purpose="fine-tune")


@pytest.mark.parametrize(
    "given", [b"abc", io.BytesIO(b"abc"), ("name.txt", b"abc"), ("name.txt", io.BytesIO(b"abc"), "text/plain")]
)
def test_files_of_every_kind_that_the_client_takes(client: openai.OpenAI, given: Any) -> None:
    made = client.files.create(file=given, purpose="vision")
    assert client.files.content(made.id).content == b"abc"
    client.files.delete(made.id)


def test_the_client_pages_through_all_files(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}", b"x"), purpose="assistants").id for i in range(5)]
    assert [file.id for file in client.files.list(purpose="assistants", limit=2, order="asc")] == made
    assert [file.id for file in client.files.list(purpose="assistants", limit=2)] == made[::-1]
    for name in made:
        client.files.delete(name)


def test_a_batch_from_upload_to_results(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", rows(20)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"of": "test"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert isinstance(batch, Batch)
    assert batch.status == "validating"
    batch = until_over(client, batch)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
    assert batch.usage is not None
    assert batch.usage.output_tokens == 100
    assert batch.metadata == {"of": "test"}
    assert batch.output_file_id is not None
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [result["custom_id"] for result in results] == [f"c{i}" for i in range(20)]
    answer = openai.types.chat.ChatCompletion.model_validate(results[0]["response"]["body"], strict=True)
    assert answer.choices[0].message.content is not None
    assert batch.id in [one.id for one in client.batches.list(limit=1)]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_answers_are_held_to_the_schema_of_their_line(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    file = client.files.create(file=("in.jsonl", rows(3, response_format=form, max_tokens=100)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = until_over(client, batch)
    assert batch.output_file_id is not None, batch
    for line in client.files.content(batch.output_file_id).text.splitlines():
        content = json.loads(line)["response"]["body"]["choices"][0]["message"]["content"]
        assert isinstance(json.loads(content)["a"], int)


def test_what_is_wrong_in_a_file_is_told_by_line(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", rows(2) + b"\n{}\n"), purpose="batch")
    batch = until_over(client, client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.line, error.code) for error in batch.errors.data] == [(3, "missing_required_parameter")]


async def test_everything_again_with_the_async_client(waiting: openai.AsyncOpenAI) -> None:
    file = await waiting.files.create(file=("in.jsonl", rows(200, max_tokens=200)), purpose="batch")
    assert (await waiting.files.retrieve(file.id)).id == file.id
    assert (await waiting.files.content(file.id)).content == rows(200, max_tokens=200)
    batch = await waiting.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert (await waiting.batches.cancel(batch.id)).status == "cancelling"
    async with asyncio.timeout(WAIT_S):
        while (batch := await waiting.batches.retrieve(batch.id)).status not in OVER:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    assert batch.id in [one.id async for one in waiting.batches.list(limit=1)]
    assert file.id in [one.id async for one in waiting.files.list(limit=1)]
    assert (await waiting.files.delete(file.id)).deleted


def test_the_pages_example(base_url: str) -> None:
    (example,) = [one for one in of_kind("python openai") if one.page.stem == "batches"]
    code = example.code.replace(URL, base_url.removesuffix("/v1"))
    exec(compile(code, str(example), "exec"), {"__name__": "example"})
