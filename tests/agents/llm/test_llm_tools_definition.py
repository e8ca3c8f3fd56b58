"""Tools as they are defined. Guards against: a schema that says other than the function takes, defaults that become
required, a description that is lost, a Context that is told to the model, and definitions that fail at their first call
instead of where they stand, or without a word of which parameter is meant.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import functools
import inspect
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from diptych.agents import llm
from diptych.agents.llm.docstrings import described
from diptych.agents.llm.tool_schema import Signature
from diptych.agents.llm.tools import as_tools

if TYPE_CHECKING:
    from fractions import Fraction


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    city: str
    title: str = ""


@dataclass
class Box:
    width: float


class Row(TypedDict):
    n: int


def test_the_schema_is_that_of_the_signature() -> None:
    @llm.tool
    def find(
        city: str,
        days: Annotated[int, Field(ge=1, le=14, description="of the forecast")] = 3,
        *,
        kind: Literal["rain", "sun"] = "rain",
        color: Color = Color.RED,
        place: Place | None = None,
    ) -> str:
        """Finds weather.

        Looks far.

        Args:
            city (str): where, for example
                Oslo
            days: not this one, the annotation wins

        Returns:
            What it found.
        """
        return city

    assert find.description == "Finds weather.\n\nLooks far.\n\nReturns:\n    What it found."
    assert find.told()["function"]["parameters"] == {
        "type": "object",
        "additionalProperties": False,
        "required": ["city"],
        "properties": {
            "city": {"type": "string", "description": "where, for example Oslo"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14, "description": "of the forecast", "default": 3},
            "kind": {"type": "string", "enum": ["rain", "sun"], "default": "rain"},
            "color": {"$ref": "#/$defs/Color", "default": "red"},
            "place": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}], "default": None},
        },
        "$defs": {
            "Color": {"enum": ["red", "blue"], "title": "Color", "type": "string"},
            "Place": {
                "type": "object",
                "title": "Place",
                "required": ["city"],
                "properties": {"city": {"type": "string"}, "title": {"type": "string", "default": ""}},
            },
        },
    }


def test_arguments_arrive_typed_and_defaults_are_the_functions_own() -> None:
    seen: dict[str, Any] = {}

    def take(
        day: dt.date, at: dt.datetime, key: uuid.UUID, sum_: Decimal, color: Color, place: Place, box: Box, row: Row,
        pairs: list[tuple[int, str]], names: set[str], extra: list[int] = [7],  # noqa: B006  the same list must come
    ) -> None:  # fmt: skip
        seen.update({name: value for name, value in locals().items() if name != "seen"})

    (tool,) = as_tools([take])
    document = json.dumps(
        {
            "day": "2026-11-23", "at": "2026-11-23T10:00:00Z", "key": "00000000-0000-0000-0000-000000000001",
            "sum_": "1.10", "color": "blue", "place": {"city": "Oslo"}, "box": {"width": 2}, "row": {"n": "5"},
            "pairs": [[1, "a"]], "names": ["x", "x"],
        }
    )  # fmt: skip
    tool.body.start(tool.body.read(document), llm.Context(deps=None))
    assert seen == {
        "day": dt.date(2026, 11, 23), "at": dt.datetime(2026, 11, 23, 10, tzinfo=dt.UTC), "key": uuid.UUID(int=1),
        "sum_": Decimal("1.10"), "color": Color.BLUE, "place": Place(city="Oslo"), "box": Box(2.0), "row": {"n": 5},
        "pairs": [(1, "a")], "names": {"x"}, "extra": [7],
    }  # fmt: skip
    assert seen["extra"] is (take.__defaults__ or ())[0]


def test_parameters_by_place_aliases_and_odd_names() -> None:
    def odd(
        a: int, b: int = 2, c: int = 3, /, model_config: int = 4, *, _u: int = 5,
        schema: Annotated[int, Field(alias="s-x")] = 6,
    ) -> tuple[int, ...]:  # fmt: skip
        return (a, b, c, model_config, _u, schema)

    (tool,) = as_tools([odd])
    context: llm.Context[None] = llm.Context(deps=None)
    assert list(tool.parameters["properties"]) == ["a", "b", "c", "model_config", "_u", "s-x"]
    assert tool.body.start(tool.body.read('{"a": 1}'), context) == (1, 2, 3, 4, 5, 6)
    assert tool.body.start(tool.body.read('{"a": 1, "c": 9, "s-x": 8, "_u": 7}'), context) == (1, 2, 9, 4, 7, 8)
    assert tool.body.with_defaults({"a": 1}) == {"a": 1, "b": 2, "c": 3, "model_config": 4, "_u": 5, "schema": 6}


def test_a_tool_is_the_function_itself_when_it_is_called() -> None:
    @llm.tool(name="plus", description="Other words.", timeout=3, parallel=False, retries=2)
    def add(a: int, b: int = 2) -> int:
        """Adds."""
        return a + b

    assert add(1) == 3
    assert (add.name, add.description, add.timeout, add.parallel, add.retries) == ("plus", "Other words.", 3, False, 2)
    assert (add.__name__, add.__doc__) == ("add", "Adds.")

    @llm.tool
    async def wait(a: int) -> int:
        return a

    assert asyncio.run(wait(4)) == 4


def test_a_tool_without_parameters_and_without_words() -> None:
    @llm.tool
    def ping() -> str:
        return "pong"

    assert ping.told() == {
        "type": "function",
        "function": {
            "name": "ping",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    }


def test_context_is_found_by_its_type_wherever_it_stands() -> None:
    class Mine(BaseModel):
        n: int

    @llm.tool
    def look(a: str, whatever: llm.Context[Mine], b: Mine) -> str:
        return f"{a}{whatever.deps.n}{b.n}"

    @llm.tool
    def last(a: str, *, ctx: Annotated[llm.Context[Mine], "mine"] = llm.INJECTED) -> str:
        return a

    for one in (look, last):
        assert not {"whatever", "ctx"} & one.parameters["properties"].keys()
    values = look.body.read('{"a": "x", "b": {"n": 2}}')
    assert look.body.start(values, llm.Context(deps=Mine(n=1))) == "x12"
    with pytest.raises(ValueError, match="whatever"):  # the model cannot bring one
        look.body.read('{"a": "x", "b": {"n": 2}, "whatever": {}}')


@pytest.mark.parametrize(
    ("docstring", "says", "text"),
    [
        ("Short.\n\nArgs:\n  a: one\n    more\n  b (int, optional): two\n\n  c: three", "one more|two|three", "Short."),
        ("Short.\n\n:param a: one\n  more\n:param int b: two\n:type b: int\n:param c: 3", "one more|two|3", "Short."),
        (
            "Short.\n\nParameters\n----------\na : int\n    one\n    more\nb : list of str, optional\n    two\n"
            "c\n    three\n\nReturns\n-------\nint\n    What.",
            "one more|two|three", "Short.\n\nReturns\n-------\nint\n    What.",
        ),
        ("Short.\n\nParameters\n----------\na, b : int\n    both\n", "both|both|", "Short."),
        ("Args: are not a section here, a: nor this", "||", "Args: are not a section here, a: nor this"),
        ("", "||", ""),
    ],
)  # fmt: skip
def test_docstrings_of_three_styles(docstring: str, says: str, text: str) -> None:
    found, told = described(docstring)
    assert found == text
    assert "|".join(told.get(name, "") for name in "abc") == says


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aA:()*- \n\tArgs", max_size=80))
def test_no_docstring_breaks_its_reader(docstring: str) -> None:
    text, told = described(f"Args:\n{docstring}")
    assert isinstance(text, str)
    assert all(isinstance(one, str) for one in told.values())


T = TypeVar("T")


def no_hint(city) -> None: ...  # type: ignore[no-untyped-def]
def stars(*cities: str) -> None: ...
def options(**cities: str) -> None: ...
def hidden(x: Fraction) -> None: ...
def callback(x: Callable[[int], int]) -> None: ...
def opaque(good: int, x: Iterator[object] | socket) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def broken(x: 1 / 0) -> None: ...  # type: ignore[valid-type]
def variable(x: T) -> None: ...  # type: ignore[type-var]
def two(a: llm.Context[int], b: llm.Context[str]) -> None: ...
def nested(a: list[llm.Context[int]]) -> None: ...
def maybe(a: llm.Context[int] | None) -> None: ...
def field_as_default(x: int = Field(3)) -> None: ...
def default_in_field(x: Annotated[int, Field(default=3)]) -> None: ...
def size(x: int) -> None: ...


size.__name__ = "gr\u00f6\u00dfe"


def street(x: int) -> None: ...


street.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("stra\u00dfe", inspect.Parameter.KEYWORD_ONLY, annotation=int)]
)


def required(x: int) -> None: ...
def many(x: int) -> Iterator[int]:
    yield x


async def many_async(x: int):  # type: ignore[no-untyped-def]
    yield x


class Plain:
    def __init__(self) -> None: ...


def arbitrary(ok: int, x: Plain) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_hint, r"tool no_hint.*parameter 'city' has no type hint.*write city: str"),
        (stars, r"tool stars.*\*cities: name each parameter"),
        (options, r"tool options.*\*\*cities"),
        (hidden, r"tool hidden.*parameter 'x' names 'Fraction'.*TYPE_CHECKING"),
        (callback, r"tool callback.*parameter 'x' has no JSON schema"),
        (opaque, r"tool opaque.*parameter 'x' names 'socket'"),
        (broken, r"tool broken.*parameter 'x', '1 / 0', cannot be read: division by zero"),
        (variable, r"tool variable.*parameter 'x' is the variable ~T"),
        (arbitrary, r"tool arbitrary.*parameter 'x' has no JSON schema.*llm\.Context"),
        (two, r"Context in the wrong place.*'a' and 'b'"),
        (nested, r"Context in the wrong place.*'a': write a: llm\.Context\[Deps\]"),
        (maybe, r"Context in the wrong place.*'a'"),
        (field_as_default, r"default of parameter 'x' is a Field.*Annotated"),
        (default_in_field, r"default of parameter 'x' stands in its Field"),
        (size, r"'gr\xf6\xdfe' is no name of a tool.*llm\.tool\(name="),
        (street, r"parameter 'stra\xdfe' cannot be told.*Field\(alias="),
        (lambda x: x, r"'<lambda>' is no name"),
        (required, r"'required' means something else in tool_choice"),
        (many, "generator"),
        (many_async, "generator"),
        (3, "llm.tool decorates functions; 3 is none"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_where_it_is_defined(function: Any, words: str) -> None:
    with pytest.raises(llm.DefinitionError, match=words):
        llm.tool(function)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "a b"}, "'a b' is no name"),
        ({"name": "x" * 65}, "1 to 64"),
        ({"name": "none"}, "tool_choice"),
        ({"timeout": 0}, "timeout is a number of seconds above 0"),
        ({"timeout": "5"}, "timeout is a number of seconds above 0"),
        ({"retries": 1.5}, "retries is a whole number from 0 up"),
        ({"parallel": "no"}, "parallel is true or false"),
        ({"description": 5}, "description is a text"),
        ({"retries": -1}, "retries is a whole number from 0 up"),
        ({"needs_approval": "yes"}, "needs_approval is true, false or a function"),
    ],
)
def test_settings_are_looked_at_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(llm.DefinitionError, match=words):

        @llm.tool(**arguments)
        def one(x: int) -> int:
            return x


def test_methods_are_tools_of_their_instance() -> None:
    class Shelf:
        def __init__(self, word: str) -> None:
            self.word = word

        @llm.tool
        def find(self, title: str, n: int = 1) -> str:
            """Finds a book."""
            return f"{self.word} {title} {n}"

        @classmethod
        @llm.tool
        def made(cls, x: int) -> str:
            return f"{cls.__name__} {x}"

        @staticmethod
        @llm.tool
        def plain(x: int) -> int:
            return x

    one, other = Shelf("a"), Shelf("b")
    assert one.find("x") == "a x 1"
    assert list(one.find.parameters["properties"]) == ["title", "n"]
    found = as_tools([other.find, Shelf.made, Shelf.plain])
    context: llm.Context[None] = llm.Context(deps=None)
    assert [tool.name for tool in found] == ["find", "made", "plain"]
    assert found[0].body.start({"title": "t"}, context) == "b t 1"
    assert found[1].body.start({"x": 1}, context) == "Shelf 1"
    with pytest.raises(llm.DefinitionError, match=r"Shelf\.find is a method: take it from an instance"):
        as_tools([Shelf.find])


def test_callables_of_every_kind() -> None:
    class Doer:
        """A class."""

        def __call__(self, x: int) -> int:
            """Does."""
            return x

    def three(a: int, b: int, c: int = 3) -> int:
        """Sums."""
        return a + b + c

    part = functools.partial(three, 1)
    found = as_tools([Doer(), part])
    assert [(tool.name, tool.description) for tool in found] == [("Doer", "Does."), ("three", "Sums.")]
    assert found[1].parameters["required"] == ["b"]
    assert found[1].body.start({"b": 5}, llm.Context(deps=None)) == 9


def test_two_of_one_name_are_told_apart_or_refused() -> None:
    def make() -> Callable[[int], int]:
        def same(x: int) -> int:
            return x

        return same

    with pytest.raises(llm.DefinitionError, match=r"two tools are named 'same'.*make\.<locals>\.same.*prefixed"):
        as_tools([make(), make()])
    tool = llm.tool(make())
    assert as_tools([tool, tool]) == (tool,)
    with pytest.raises(llm.DefinitionError, match="already"):
        llm.tool(tool)
    with pytest.raises(llm.DefinitionError, match=r"tools\[0\] is 'same'"):
        as_tools(["same"])  # type: ignore[list-item]
    with pytest.raises(llm.DefinitionError, match="tools is a list"):
        as_tools("same")  # type: ignore[arg-type]


def test_only_what_is_needed_to_tell_apart_costs_tokens() -> None:
    def f(title: str, description: str = "x") -> None: ...

    schema = Signature.of(f, "tool f").parameters
    assert schema["properties"] == {"title": {"type": "string"}, "description": {"type": "string", "default": "x"}}


def test_a_context_does_not_show_what_it_depends_on() -> None:
    assert "word" not in repr(llm.Context(deps="postgres://me:word@host"))


class Naming(BaseModel):
    ctx: llm.Context  # type: ignore[type-arg]  # as a careless developer writes it


class Holding(BaseModel):
    ctx: llm.Context[int]


@dataclass
class Carrying:
    inner: list[llm.Context[int]]


@pytest.mark.parametrize("kind", [Naming, Holding, Carrying, list[Holding]])
def test_a_context_within_a_type_is_told_as_such(kind: Any) -> None:
    def find(x: Any) -> str:
        return ""

    find.__annotations__["x"] = kind
    with pytest.raises(llm.DefinitionError, match=r"tool find.*parameter 'x': Context in the wrong place"):
        llm.tool(find)
    with pytest.raises(llm.DefinitionError, match=r"ask: the result's type: Context in the wrong place"):

        @llm.call("test/m", output=kind)
        def ask() -> str:
            return "?"
