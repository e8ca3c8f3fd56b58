"""Wrong uses of wrapped clients, batches and the testing kit, each of which both must refuse: see wrong_calls.py."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUntypedFunctionDecorator=false, reportUntypedClassDecorator=false

from __future__ import annotations

from openai import AsyncOpenAI, OpenAI

from diptych import llm
from diptych.llm.testing import ScriptedModel, failure, registry_of, tool_call

from .right_beside import Book, book


async def wrapped() -> None:
    llm.wrap(OpenAI)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    llm.wrap("https://example.com")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    llm.wrap(OpenAI(), retries=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    llm.wrap(OpenAI(), max_retries="3")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    client = llm.wrap(OpenAI())
    await client.create(response_model=Book)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    client.create(response_model=Book).name  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    client.create(response_model=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    client.create_with_completion(response_model=Book).title  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    client.create_partial(response_model=Book).title  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    client.on("competion", print)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    number: int = client.create(response_model=Book)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    for one in client.create_iterable(response_model=Book):
        one.name  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    async for one in client.create_iterable(response_model=Book):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        print(one)
    later = llm.wrap(AsyncOpenAI())
    later.create(response_model=Book).title  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    later.create(response_model=Book)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    for one in later.create_iterable(response_model=Book):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        print(one)
    sync: llm.Wrapped = llm.wrap(AsyncOpenAI())  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(number, sync)


async def batches() -> None:
    llm.batch(len, ["x"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.batch(book)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    llm.batch(book, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.batch(book, ["x"], window=24)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.batch(book, ["x"], poll_s="10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await llm.batch(book, ["x"])  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    llm.batch.aio(book, ["x"]).values  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    llm.batch(book, ["x"]).value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    llm.batch(book, ["x"])[0].value.name  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    llm.batch(book, ["x"])["item-0000"]  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    llm.batch_begin(book, ["x"], poll_s=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    llm.batch_begin(book, ["x"]).wait(poll="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    llm.batch_resume(3, book)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    llm.batch_resume("pool/m@b", print)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    llm.batch_list("pool", limit="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    results: llm.BatchResults[str] = llm.batch(book, ["x"])  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    print(results)


def kit() -> None:
    registry_of(pool="hello")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    registry_of(pool=[ScriptedModel(["hello"])])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    registry_of(ScriptedModel(["hello"]))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ScriptedModel([3])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    ScriptedModel(["x"], delay="1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    tool_call(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    failure(429)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.Registry(clusters={"lab": "http://127.0.0.1:1"})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    llm.using(registry=ScriptedModel(["x"]))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
