"""What type checkers know of calls, replies, streams and results; test_llm_types.py has both checkers read it."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Generic, Literal, TypedDict, TypeVar, assert_type

from pydantic import BaseModel, Field, RootModel
from typing_extensions import TypeForm

from diptych import llm
from diptych.protos.messages import Message

T = TypeVar("T")


class Book(BaseModel):
    title: str
    year: int


class Page(BaseModel, Generic[T]):
    rows: list[T]


class Shelf(RootModel[list[Book]]):
    pass


@dataclass
class Point:
    x: int


class Row(TypedDict, total=False):
    name: str


class Colour(Enum):
    RED = "red"


@llm.call("pool/m", temperature=0.2, max_tokens=64, stop=["."], options={"pool": {"min_p": 0.1}}, extra={"x": [1]})
def plain(topic: str, /, size: int = 1) -> str:
    return f"{topic} {size}"


@llm.call("pool/m")
async def later(topic: str) -> list[llm.Message]:
    return [llm.system("be brief"), llm.user(topic)]


@llm.call("pool/m", output=Book)
def book(topic: str) -> llm.Message:
    return llm.user(topic, llm.image(url="data:image/png;base64,AAAA"))


@llm.call("pool/m", output=Book)
async def book_later(topic: str) -> str:
    return topic


@llm.call(template=llm.Template("{{topic}} {{year}}"), output=list[Book])
def books(topic: str) -> dict[str, Any]:
    return {"year": 1815}


@llm.call("pool/m", output=Book | int)
def one_of(topic: str) -> str:
    return topic


@llm.call("pool/m")
def parts(photo: llm.Media) -> list[str | llm.Media]:
    return ["What is this?", photo]


@llm.call("pool/m")
def kept(photo: llm.Media) -> Sequence[llm.Text | llm.Media]:
    return [llm.kept("5m", "A long instruction."), photo]


@llm.call("pool/m")
def rendered(topic: str) -> Any:
    return llm.Template("{topic}")(topic=topic)


class Library:
    name = "main"

    @llm.call("pool/m", output=Book)
    def find(self, topic: str) -> str:
        return f"{self.name}: {topic}"

    @llm.call("pool/m")
    async def tell(self, topic: str, size: int = 3) -> str:
        return f"{self.name}: {topic} {size}"


def verbs() -> None:
    assert_type(plain("x"), llm.Reply[str])
    assert_type(plain("x", size=2).value, str)
    assert_type(book("x"), llm.Reply[Book])
    assert_type(book("x").value, Book)
    assert_type(book("x").value.title, str)
    assert_type(books("x").value, list[Book])
    assert_type(plain.stream("x", 2), llm.Stream[str])
    assert_type(book.stream(topic="x"), llm.Stream[Book])
    assert_type(book.request("x"), dict[str, Any])
    assert_type(book.version, str)
    assert_type(parts(llm.image(path="a.png")), llm.Reply[str])
    assert_type(kept(llm.image(path="a.png")), llm.Reply[str])
    told: llm.Reply[str] = rendered("x")
    print(told)


async def waiting_verbs() -> None:
    pending = [later("x")]
    assert_type(pending, list[Coroutine[Any, Any, llm.Reply[str]]])
    assert_type(await pending[0], llm.Reply[str])
    assert_type(await plain.aio("x"), llm.Reply[str])
    assert_type((await book_later("x")).value, Book)
    assert_type((await book_later.aio("x")).value, Book)
    assert_type(book_later.stream("x"), llm.Stream[Book])
    assert_type(await book.stream("x").reply.aio(), llm.Reply[Book])


async def same_call_otherwise() -> None:
    warm = book.with_("pool/other", temperature=1.0, tools=[], retries=llm.Retries())
    assert_type(warm("x").value, Book)
    held = later.with_(cache=False, strict=False)
    assert_type(await held("x"), llm.Reply[str])
    with llm.using(model="pool/other", temperature=0.0):
        assert_type(plain("x").value, str)


async def methods() -> None:
    assert_type(Library().find("x"), llm.Reply[Book])
    assert_type(await Library().tell("x", size=2), llm.Reply[str])
    assert_type(Library().find.stream("x"), llm.Stream[Book])
    assert_type(Library.find(Library(), "x").value, Book)


def replies() -> None:
    reply = book("x")
    assert_type(reply.text, str)
    assert_type(reply.messages, tuple[Message, ...])
    assert_type(reply.attempts, tuple[llm.Attempt, ...])
    assert_type(reply.cost, Decimal | None)
    assert_type(reply.spent, llm.Spent)
    assert_type(reply.resume("and then?", temperature=0.5), llm.Reply[Book])
    assert_type(reply.run_tools(timeout=2.0), list[llm.ToolOutcome])
    assert_type(reply.resume(reply.run_tools()), llm.Reply[Book])
    assert_type(reply.resume([llm.result("call-1", 3), "go on"]), llm.Reply[Book])
    assert_type(reply.fork(3), list[llm.Reply[Book]])
    assert_type(reply.fork(3, "and then?", seed=1), list[llm.Reply[Book]])


async def replies_later() -> None:
    reply = await book_later("x")
    assert_type(await reply.resume.aio("and then?"), llm.Reply[Book])
    assert_type(await reply.run_tools.aio(), list[llm.ToolOutcome])
    assert_type(await reply.fork.aio(2), list[llm.Reply[Book]])


def result_of(kind: TypeForm[T]) -> T:
    """Types of results reach the value through a function of the developer's own, too."""

    @llm.call("pool/m", output=kind)
    def asked(topic: str) -> str:
        return topic

    return asked("x").value


def results() -> None:
    assert_type(result_of(int), int)
    assert_type(result_of(Page[Book]), Page[Book])
    assert_type(result_of(Page[Book]).rows[0], Book)
    assert_type(result_of(Point), Point)
    assert_type(result_of(Row), Row)
    assert_type(result_of(Colour), Colour)
    assert_type(result_of(Shelf), Shelf)
    assert_type(result_of(dict[str, list[int]]), dict[str, list[int]])
    assert_type(result_of(tuple[int, str]), tuple[int, str])
    assert_type(one_of("x").value, Book | int)
    assert_type(result_of(str | None), str | None)
    assert_type(result_of(Literal["a", "b"]), Literal["a", "b"])
    assert_type(result_of(Annotated[int, Field(gt=0)]), int)
    assert_type(result_of(llm.Maybe[Book]), llm.Maybe[Book])
    assert_type(result_of(llm.Maybe[Book]).or_raise(), Book)
    assert_type(result_of(list[Book | Point]), list[Book | Point])


def pieces() -> None:
    for text in plain.stream("x").text():
        assert_type(text, str)
    for known in book.stream("x").partials(grow=False):
        assert_type(known, llm.Partial[Book])
        assert_type(known.validated(), Book)
        assert_type(known.to_dict(), dict[str, Any])
        assert_type(known.is_final("/title"), bool)
    for item in books.stream("x").items():
        assert_type(item, Book)
    with book.stream("x") as stream:
        for event in stream:
            if isinstance(event, llm.Finished):
                assert_type(event.reply, llm.Reply[Book])
            elif isinstance(event, llm.Restarted):
                assert_type(event.error, llm.CallFailed)
        assert_type(stream.reply(), llm.Reply[Book])


async def pieces_later() -> None:
    async for text in later.stream("x").text():
        assert_type(text, str)
    async for known in book_later.stream("x").partials():
        assert_type(known.validated(), Book)
    async with books.stream("x") as stream:
        async for item in stream.items():
            assert_type(item, Book)


def items_of_lists(
    sequence: llm.Stream[Sequence[int]],
    iterable: llm.Stream[Iterable[str]],
    pairs: llm.Stream[tuple[Book, ...]],
    unique: llm.Stream[set[int]],
    frozen: llm.Stream[frozenset[int]],
    shelf: llm.Stream[Shelf],
) -> None:
    for number in sequence.items():
        assert_type(number, int)
    for word in iterable.items():
        assert_type(word, str)
    for one in pairs.items():
        assert_type(one, Book)
    for number in unique.items():
        assert_type(number, int)
    for number in frozen.items():
        assert_type(number, int)
    for _ in shelf.items():
        pass


def passed_on(call: llm.Call[[str], llm.Reply[Book], Book]) -> Book:
    return call("x").value


def given() -> None:
    assert_type(passed_on(book), Book)
