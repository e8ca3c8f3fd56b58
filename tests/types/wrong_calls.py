"""Wrong uses of calls, each of which both type checkers must refuse, at its line and by its name.

A refusal that is lost leaves a comment that ignores nothing, which is an error itself: see test_llm_types.py.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUntypedFunctionDecorator=false, reportUntypedClassDecorator=false

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from diptych import llm

from .right_calls import Book, Library, book, book_later, books, later, passed_on, plain


class Other(BaseModel):
    name: str


async def ways_to_call() -> None:
    await plain("x")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    await book.stream("x")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    plain()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    plain(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    plain("x", sise=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    plain("x", size="two")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    plain("x", 2, 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    plain(topic="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    book.stream()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    book.request(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await book.aio(topic=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Library().find()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Library().find(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    later("x").value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    await later(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    later("x")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    async with plain("x"):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass


async def values() -> None:
    number: int = plain("x").value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    other: Other = book("x").value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    book("x").value.name  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    (await book_later("x")).value.name  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    book("x").value()  # type: ignore[operator]  # pyright: ignore[reportCallIssue]
    books("x").value.title  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    book("x").values  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    book("x").value = Book(title="x", year=1)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    replies: llm.Reply[Other] = book("x")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    passed_on(plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    passed_on(book_later)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    print(number, other, replies)


def replies() -> None:
    reply = book("x")
    reply.resume()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    reply.resume(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    reply.resume("x", temprature=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    reply.run_tools(timeout="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    reply.run_tools(retries=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    reply.run_tools(on_error="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    reply.fork("2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    reply.fork(2, seed="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def pieces() -> None:
    plain.stream("x").items()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    book.stream("x").items()  # mypy takes it for a stream of a RootModel  # pyright: ignore[reportAttributeAccessIssue]
    book.stream("x").partials(grows=False)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    for known in book.stream("x").partials():
        year: int = known.validated().title  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
        print(year)
    for item in books.stream("x").items():
        title: int = item.title  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
        print(title)
    for text in book_later("x"):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        print(text)
    async for text in plain("x"):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        print(text)
    book.stream("x").value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    book.stream("x").reply.value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def what_call_takes() -> None:
    llm.call("pool/m", temprature=0.5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    llm.call("pool/m", temperature="warm")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", thinking="deeply")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", on_unsupported="ignore")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", options={"pool": {"min_pp": 0.1}})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", options={"pool": {"min_p": "0.1"}})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", options={"opanai": {"store": True}})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", options={"anthropic": {"service_tier": "flex"}})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", output=Book(title="x", year=1))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    llm.call("pool/m", output=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    llm.call("pool/m", tools=["search"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", tools=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", retries=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", budget=1.5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", cache=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", template="{{x}}")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call(Book)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    book.with_(temprature=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    book.with_(output=Other)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    book.with_(options={"openai": {"verbosity": "loud"}})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with llm.using(modell="pool/m"):  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        pass
    params: llm.Params = {"temperature": 0.5, "temprature": 0.5}  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportAssignmentType]
    print(params)


@llm.call("pool/m")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
def says_a_number(topic: str) -> int:
    return len(topic)


@llm.call("pool/m")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def says_bytes(topic: str) -> bytes:
    return topic.encode()


@llm.call  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
def without_parentheses(topic: str) -> str:
    return topic


@llm.call("pool/m")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
class NoFunction:
    pass


def messages(given: dict[str, Any]) -> None:
    llm.user(given)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.system(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.image("https://example.com/a.png")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    llm.image(url=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.image(url="https://example.com/a.png", detail="sharp")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.result("call-1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    llm.Budget(dollars="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.Retries(attempts="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.Retries(tries=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
