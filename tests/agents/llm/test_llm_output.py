"""Results of every type, through the wire: what the model is told, what an answer becomes, what a type that cannot be
told is refused with.

Guards against types that only work as bare models, numbers that lose digits on the way, prose that hides the JSON, text
that takes quadratic time, and a failure of a validator's own call that passes for a fault of the answer.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, Optional, TypeVar
from uuid import UUID

import pytest
from jsonschema_rs import validator_for
from pydantic import (
    AfterValidator,
    AliasChoices,
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    RootModel,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from diptych.agents import llm
from diptych.agents.llm.json_text import last_json
from diptych.agents.llm.output import Output
from diptych.agents.llm.testing import Said, ScriptedModel, registry_of

T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)


class Worker(Person):
    manager: Optional["Worker"] = None  # noqa: UP037, UP045  a name of itself
    since: date = date(2020, 1, 1)


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: int | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    bark: str


class Film(TypedDict):
    title: str
    year: NotRequired[int]


class Loose(TypedDict, total=False):
    title: str


class Point(NamedTuple):
    x: int
    y: int = 0


@dataclass
class Box:
    width: float
    tags: list[str]


@pydantic_dataclass
class Crate:
    box: Box


class Money(BaseModel):
    amount: Decimal
    id: UUID
    at: datetime
    colours: set[Colour]


Even = Annotated[int, Field(multiple_of=2)]
Names = RootModel[list[str]]
UUID_TEXT = "12345678-1234-5678-1234-567812345678"

CATALOGUE: list[tuple[Any, Any, Any]] = [  # type, the JSON that says it, the value
    (Person, {"name": "Ann", "age": 3}, Person(name="Ann", age=3)),
    (
        Worker,
        {"name": "B", "age": 40, "manager": {"name": "C", "age": 50, "since": "2021-02-03"}},
        Worker(name="B", age=40, manager=Worker(name="C", age=50, since=date(2021, 2, 3))),
    ),
    (Page[Person], {"items": [{"name": "A", "age": 1}]}, Page[Person](items=[Person(name="A", age=1)])),
    (Page[int | str], {"items": [1, "1"], "next": 2}, Page[int | str](items=[1, "1"], next=2)),
    (Person | Cat, {"kind": "cat", "lives": 9}, Cat(kind="cat", lives=9)),
    (Annotated[Cat | Dog, Field(discriminator="kind")], {"kind": "dog", "bark": "w"}, Dog(kind="dog", bark="w")),
    (Literal["a", "b", 3], 3, 3),
    (Colour, "blue", Colour.BLUE),
    (list[Person], [{"name": "A", "age": 1}], [Person(name="A", age=1)]),
    (Iterable[int], [1, 2], [1, 2]),
    (Sequence[int], [1, 2], [1, 2]),
    (set[int], [2, 1, 2], {1, 2}),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[int, ...], [], ()),
    (dict[str, int], {"a": 1}, {"a": 1}),
    (dict[int, Person], {"7": {"name": "A", "age": 1}}, {7: Person(name="A", age=1)}),
    (int, 42, 42),
    (float, 1, 1.0),
    (bool, True, True),
    (int | None, None, None),
    (Optional[Person], None, None),  # noqa: UP045
    (Optional[Person], {"name": "A", "age": 1}, Person(name="A", age=1)),  # noqa: UP045
    (Film, {"title": "M"}, {"title": "M"}),
    (Film, {"title": "M", "year": 1931}, {"title": "M", "year": 1931}),
    (Loose, {}, {}),
    (Box, {"width": 2.5, "tags": ["x"]}, Box(2.5, ["x"])),
    (Crate, {"box": {"width": 1.0, "tags": []}}, Crate(Box(1.0, []))),
    (Point, [1, 2], Point(1, 2)),
    (Even, 4, 4),
    (Names, ["a"], Names(["a"])),
    (date, "2026-02-28", date(2026, 2, 28)),
    (UUID, UUID_TEXT, UUID(UUID_TEXT)),
    (Decimal, "0.10", Decimal("0.10")),
    (
        Money,
        {"amount": "1.10", "id": UUID_TEXT, "at": "2026-01-02T03:04:05Z", "colours": ["red"]},
        Money(amount="1.10", id=UUID_TEXT, at="2026-01-02T03:04:05Z", colours=["red"]),
    ),
    (llm.Maybe[int], {"is_known": True, "why": "", "value": 3}, llm.Maybe[int](is_known=True, why="", value=3)),
    (Any, {"x": [1]}, {"x": [1]}),
]


def called(kind: Any, *entries: Any, **given: Any) -> tuple[Any, ScriptedModel]:
    """A call with this type of result, and the model that answers it."""
    model = ScriptedModel(entries)
    registry = llm.Registry(environ={})
    registry.add("test", model)

    @llm.call("test/m", output=kind, registry=registry, **{"retries": llm.Retries(attempts=1, longer=False), **given})
    def ask() -> str:
        return "?"

    return ask, model


def answer_of(kind: Any, value: Any) -> Any:
    return {"value": value} if Output(kind).is_wrapped else value


@pytest.mark.parametrize(("kind", "value", "wanted"), CATALOGUE, ids=lambda case: str(case)[:30])
def test_a_type_of_any_kind_is_told_and_read(kind: Any, value: Any, wanted: Any) -> None:
    """Whole, and as the stream's reply; the schema is an object at the top, and whole by itself."""
    said = answer_of(kind, value)
    call, model = called(kind, said, said)
    found = call().value
    assert found == wanted
    assert type(found) is type(wanted)
    assert call.stream().reply().value == wanted
    schema = model.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["type"] == "object"
    assert all(ref.startswith("#/$defs/") and ref[8:] in schema["$defs"] for ref in refs_in(schema))


def refs_in(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return own + [ref for one in schema.values() for ref in refs_in(one)]
    return [ref for one in schema for ref in refs_in(one)] if isinstance(schema, list) else []


def test_fields_are_told_in_the_order_of_the_definition() -> None:
    """What thinks comes first."""
    assert list(Output(Worker).schema["properties"]) == ["name", "age", "manager", "since"]


def test_a_number_keeps_its_digits() -> None:
    """A bare result is read as it was written, not written anew."""
    digits = "0.12345678901234567890"
    assert Output(Decimal).parse(f'{{"value": "{digits}"}}') == Decimal(digits)
    assert Output(int).parse(f'{{"value": {10**40 + 1}}}') == 10**40 + 1


def test_a_result_without_its_wrapper_is_read_too() -> None:
    """A model that is not held to the form leaves it out."""

    class Valued(BaseModel):
        value: int

    assert Output(int).parse("42") == 42
    assert Output(list[int]).parse("Here: [1, 2]") == [1, 2]
    assert Output(Valued | None).parse('{"value": 3}') == Valued(value=3)
    assert Output(Valued | None).parse('{"value": {"value": 3}}') == Valued(value=3)
    assert Output(int).parse('{"value": 1, "value": 2}') == 2
    assert Output(Literal["yes", "no"]).parse('"no"') == "no"


class Handler(BaseModel):
    name: str
    on_done: Callable[[], None]


class Alien:
    pass


def test_a_type_that_cannot_be_told_is_refused_where_it_is_written() -> None:
    with pytest.raises(llm.DefinitionError, match=r"ask: no JSON can be a Handler\.on_done of the result's type"):
        called(Handler)
    with pytest.raises(llm.DefinitionError, match=r"ask: .*pydantic cannot read: .*Alien.*BaseModel or a dataclass"):
        called(list[Alien])
    with pytest.raises(llm.DefinitionError, match=r"ask: .*names 'Nowhere', which is not defined"):
        called(list["Nowhere"])  # type: ignore[name-defined]  # noqa: F821

    class Late(BaseModel):
        other: "Missing"  # type: ignore[name-defined]  # noqa: F821, UP037

    with pytest.raises(llm.DefinitionError, match=r"ask: .*names 'Missing'.*define it at the top of the module"):
        called(Late)

    class Holder(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        alien: Alien

    with pytest.raises(llm.DefinitionError, match=r"ask: no JSON can be a Holder\.alien of"):
        called(Holder)


@pytest.mark.parametrize("value", [Person(name="Ann", age=3), [int], {"a": int}, 3, "Person", json])
def test_a_value_is_no_type(value: Any) -> None:
    """pydantic takes dicts for its own core schemas, and raises a KeyError."""
    with pytest.raises(llm.DefinitionError, match=r"ask: output= takes a type, and this is a value, a \w+: write "):
        called(value)


class Number(Enum):
    ONE = 1


@pytest.mark.parametrize("kind", [dict[Number, int], dict[Literal[1, 2], int], dict[tuple[int, int], int]])
def test_keys_that_no_text_is_are_refused(kind: Any) -> None:
    with pytest.raises(llm.DefinitionError, match=r"ask: no JSON can be a dict of .*keys of a JSON object are texts"):
        called(kind)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        (int, ["0", "-7", "12"], ["a", "1.5", ""]),
        (Annotated[int, Field(ge=0)], ["0", "7"], ["-7"]),
        (float, ["1", "-2.5"], ["a", ""]),
        (bool, ["true", "false"], ["maybe"]),
        (
            date,
            ["2024-02-29", "2023-12-31", "1999-04-30"],
            ["2023-02-29", "2023-04-31", "0000-01-01", "a", "2023-13-01"],
        ),
        (UUID, ["7d444840-9dc0-11d1-b245-5ffdce74fad2"], ["7d444840"]),
        (Annotated[str, Field(pattern="^a+$")], ["a", "aa"], ["b", ""]),
        (Literal["a", "b"], ["a"], ["c"]),
    ],
)
def test_keys_of_dicts_are_told_as_python_takes_them(key: Any, good: list[str], bad: list[str]) -> None:
    """pydantic tells any text for the key of a dict[int, ...]: an engine would be held to what Python refuses."""
    output: Output[Any] = Output(dict[key, int])
    checker = validator_for(output.schema)
    for one in good:
        assert checker.is_valid({one: 1}), one
        output.parse(json.dumps({one: 1}))
    for one in bad:
        assert not checker.is_valid({one: 1}), one
        with pytest.raises(llm.InvalidOutput):
            output.parse(json.dumps({one: 1}))


class Lazy(BaseModel):
    numbers: Iterable[int]


@pytest.mark.parametrize(("kind", "told"), [(Lazy, r"Lazy\.numbers"), (list[Iterable[int]], "list")])
def test_what_would_be_checked_only_when_it_is_read_is_refused(kind: Any, told: str) -> None:
    """{"numbers": ["x"]} would be a Lazy, and nobody would hear of it before its numbers are read."""
    with pytest.raises(llm.DefinitionError, match=rf"ask: no JSON can be a {told} of .*Iterable.* write list"):
        called(kind)


def test_lax_takes_what_strict_refuses() -> None:
    said = {"name": "Ann", "age": "25"}
    strict, _ = called(Person, said)
    with pytest.raises(llm.InvalidOutput, match="without quotes"):
        strict()
    lax, _ = called(Person, said, strict=False)
    assert lax().value == Person(name="Ann", age=25)
    other, _ = called(Person, said, said)
    assert other.with_(strict=False)().value.age == 25
    with pytest.raises(llm.InvalidOutput):
        other()


class Quoted(BaseModel):
    quote: str

    @field_validator("quote")
    @classmethod
    def in_source(cls, quote: str, info: ValidationInfo) -> str:
        assert info.context is not None
        if quote not in info.context["source"]:
            raise ValueError(f"{quote!r} is not in the source: copy it word by word")
        return quote


async def test_validators_get_their_context_in_each_way_of_calling() -> None:
    said = {"quote": "two"}
    call, _ = called(Quoted, *[said] * 6, validation={"source": "one two three"})
    assert call().value.quote == (await call.aio()).value.quote == call.stream().reply().value.quote == "two"
    other = call.with_(validation={"source": "four"})
    with pytest.raises(llm.InvalidOutput) as failed:
        other()
    assert str(failed.value.report) == "- /quote: 'two' is not in the source: copy it word by word; found \"two\""
    assert call().value.quote == "two"


def test_a_validator_may_call_a_model_itself() -> None:
    """In the caller's thread: on the loop of synchronous calls it would wait for itself."""
    judge, judge_model = called(llm.Maybe[bool], *[{"is_known": True, "why": "", "value": True}] * 3)

    def judged(text: str) -> str:
        if not judge().value.value:
            raise ValueError("not nice")
        return text

    class Nice(BaseModel):
        text: Annotated[str, AfterValidator(judged)]

    call, _ = called(Nice, *[{"text": "hello"}] * 3)
    assert call().value.text == "hello"
    assert call.stream().reply().value.text == "hello"
    assert len(judge_model.requests) == 2


async def test_a_validator_may_call_a_model_itself_where_the_call_is_awaited() -> None:
    judge, judge_model = called(bool, {"value": True}, {"value": False})

    def judged(text: str) -> str:
        if not judge().value:
            raise ValueError("not nice")
        return text

    class Nice(BaseModel):
        text: Annotated[str, AfterValidator(judged)]

    call, _ = called(Nice, {"text": "hello"}, {"text": "boo"})
    assert (await call.aio()).value.text == "hello"
    with pytest.raises(llm.InvalidOutput, match="not nice"):
        await call.stream().reply.aio()
    assert len(judge_model.requests) == 2


def test_a_validators_own_error_is_not_the_answers_fault() -> None:
    """UsageError is a ValueError, which pydantic takes for a bad value: the model would be asked again and again."""

    def judged(text: str) -> str:
        raise llm.UsageError("there is no such judge")

    class Nice(BaseModel):
        text: Annotated[str, AfterValidator(judged)]

    call, model = called(Nice, {"text": "hello"}, {"text": "hello"}, retries=llm.Retries(attempts=2))
    with pytest.raises(llm.UsageError, match="no such judge"):
        call()
    assert len(model.requests) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('I used {x}, then {"a": 1}', '{"a": 1}'),
        ('First {"a": 1}, no: {"a": 2}. Done.', '{"a": 2}'),
        ('```json\n{"a": [1, {"b": 2}]}\n```', '{"a": [1, {"b": 2}]}'),
        ('{"a": "} {"}', '{"a": "} {"}'),
        ("[he said] {'a':1} [2]", "[2]"),
        ('{"a": {"b": 1}, "c": [1', '{"a": {"b": 1}, "c": [1'),
        ('{"a": {"b": 1}, "c": "[1]', '{"a": {"b": 1}, "c": "[1]'),
        ("see [1] and {2}", "[1]"),
        ("42", "42"),
        ('  "yes"\n', '"yes"'),
        ("no JSON at all", "no JSON at all"),
        ("", ""),
        ("[]{}", "{}"),
        ('{"a": 1}{"b":', '{"a": 1}'),
    ],
)
def test_the_last_complete_json_counts(text: str, found: str) -> None:
    assert last_json(text) == found


@pytest.mark.parametrize("unit", ["[", "{", '{"a":', '["', '["[",', '{"a":[1,', '"{', "[1]{", '\\"[', "[0," + "9" * 40])
def test_text_that_is_hostile_takes_linear_work(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in calls of the decoder and characters that it reads, not in seconds."""
    from diptych.agents.llm import json_text

    num_read = 0
    decode = json_text._decoder.raw_decode

    class Counting:
        def raw_decode(self, text: str, at: int) -> tuple[Any, int]:
            nonlocal num_read
            try:
                found = decode(text, at)
            except json.JSONDecodeError as exc:
                num_read += (len(text) if "Unterminated" in exc.msg else exc.pos) - at + 1
                raise
            except RecursionError:
                num_read += sys.getrecursionlimit()
                raise
            num_read += found[1] - at
            return found

    monkeypatch.setattr(json_text, "_decoder", Counting())
    text = unit * (60_000 // len(unit))
    last_json(text)
    assert num_read <= 8 * len(text) + 5000


def test_nesting_beyond_any_depth_is_told_as_such() -> None:
    deep = "[" * 10_000 + "]" * 10_000
    call, _ = called(list[Any], Said(text=deep))
    with pytest.raises(llm.InvalidOutput, match="nested too deeply") as failed:
        call()
    assert failed.value.report.text == deep
    assert len(str(failed.value)) < 1000


def test_aliases_are_the_names_on_the_wire() -> None:
    class Named(BaseModel):
        first: str = Field(alias="firstName")
        last: str = Field(validation_alias=AliasChoices("lastName", "surname"))

    assert list(Output(Named).schema["properties"]) == ["firstName", "lastName"]
    assert Output(Named).parse('{"firstName": "A", "surname": "B"}').last == "B"
    with pytest.raises(llm.InvalidOutput) as failed:
        Output(Named).parse('{"firstName": 3, "lastName": "B"}')
    assert failed.value.report.paths == ("/firstName",)


def test_maybe_is_what_it_says() -> None:
    output: Output[llm.Maybe[Person]] = Output(llm.Maybe[Person])
    known = output.parse('{"is_known": true, "why": "told", "value": {"name": "A", "age": 1}}')
    assert known
    assert known.or_raise().name == "A"
    unknown = output.parse('{"is_known": false, "why": "no age is told", "value": null}')
    assert not unknown
    assert unknown.value is None
    with pytest.raises(LookupError, match="no age is told"):
        unknown.or_raise()
    for text in ('{"is_known": true, "why": "", "value": null}', '{"is_known": false, "why": "", "value": 1}'):
        with pytest.raises(llm.InvalidOutput):
            Output(llm.Maybe[int]).parse(text)


class Tree(BaseModel):
    children: list["Tree"] = []  # noqa: UP037  a name of itself


def test_a_provider_that_cannot_hold_a_schema_names_the_type_and_is_told_in_words_on_request() -> None:
    """Anthropic takes no schema that refers to itself; left out in silence, nobody would tell the model of the form."""
    registry = llm.Registry(environ={}, keys={"anthropic": "sk-0123456789"})

    @llm.call("anthropic/claude-sonnet-4-5", output=Tree, registry=registry)
    def ask() -> str:
        return "A tree."

    with pytest.raises(
        llm.Unsupported, match=r"ask: .* for output\.\S+items \(refers to itself.*change the result's type"
    ):
        ask.request()
    sent = ask.with_(on_unsupported="drop").request()
    assert '"$defs":{"Tree"' in json.dumps(sent["system"]).replace('\\"', '"')
    assert "output_config" not in sent


@pytest.mark.parametrize(
    "model",
    [
        "anthropic/claude-3-5-haiku-20241022",
        "anthropic/claude-sonnet-4-20250514",
        "bedrock/anthropic.claude-3-5-haiku-20241022-v1:0",
    ],
)
def test_a_model_that_takes_no_schema_is_told_in_words(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """As providers of that kind are, without being asked to: its answers are validated here, and asked for anew."""
    environ = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    registry = llm.Registry(environ=environ, keys={"anthropic": "sk-0123456789"})

    @llm.call(model, output=Person, registry=registry)
    def ask() -> str:
        return "Who?"

    for way in ("error", "warn", "drop"):
        sent = ask.with_(on_unsupported=way).request()
        words = json.dumps(sent["system"]).replace('\\"', '"')
        assert words.count("matches this JSON Schema") == 1
        assert '"required":["name","age"]' in words
        assert "output_config" not in sent
    assert not caplog.records
    with pytest.raises(llm.Unsupported, match=r"no words for seed .*leave it out"):
        ask.with_(seed=1).request()


def test_what_a_model_that_takes_no_schema_says_is_validated_and_asked_for_anew() -> None:
    model = ScriptedModel(["Sure!", 'Here: {"name": "Ann", "age": 31}'], codec_name="anthropic.messages")
    ask = llm.call("old/claude-3-5-haiku-latest", output=Person, registry=registry_of(old=model))(lambda: "Who?")
    reply = ask()
    assert (reply.value.name, [one.why for one in reply.attempts]) == ("Ann", ["first", "reask"])


def test_a_pattern_that_looks_around_names_the_remedy_and_holds_with_it() -> None:
    """No grammar expresses it: a cluster reports it as not enforced, and the value is asked for anew."""
    plain: Any = Annotated[str, Field(pattern=r"(?<!a)b")]
    with pytest.raises(llm.DefinitionError, match=r"look-around, .* not supported; give it compiled, .*re\.compile"):
        llm.call("test/m", output=plain)(lambda: "go")
    with pytest.raises(llm.DefinitionError, match=r"'text'.*give it compiled"):

        @llm.tool
        def say(text: Annotated[str, Field(pattern=r"(?<!a)b")]) -> str:
            """Says it."""
            return text

    model = ScriptedModel(['"ab"', '"b"'])
    kind: Any = Annotated[str, Field(pattern=re.compile(r"(?<!a)b"))]
    reply = llm.call("test/m", output=kind, registry=registry_of(test=model))(lambda: "go")()
    assert (reply.value, len(reply.attempts)) == ("b", 2)
    assert "String should match pattern" in str(reply.attempts[0].error)


@pytest.mark.parametrize(
    ("key", "wrong", "right"), [(IPvAnyAddress, "nope", "10.0.0.1"), (AnyUrl, "nope", "http://a.b/")]
)
def test_keys_that_no_grammar_holds_are_looked_at_here(key: Any, wrong: str, right: str) -> None:
    model = ScriptedModel([{wrong: 1}, {right: 1}])
    ask = llm.call("test/m", output=dict[key, int], registry=registry_of(test=model))(lambda: "go")
    reply = ask()
    assert {str(name): value for name, value in reply.value.items()} == {right: 1}
    assert [one.why for one in reply.attempts] == ["first", "reask"]
    assert f"/{wrong}: " in str(reply.attempts[0].error)
