"""Instructor as its documentation shows it, in each of its modes; any retry is a failure.

Guards against answers that need a second attempt: a schema that is not enforced without `strict`, calls where one
object was asked for, a stream that is no JSON until it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar

import instructor
import openai
import pytest
from instructor.core.exceptions import IncompleteOutputException
from pydantic import BaseModel, Field, field_validator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Mode.TOOLS_STRICT is deprecated:DeprecationWarning"),
]

ASK: list[Any] = [{"role": "user", "content": "Extract: Jason is 25 years old and lives in Lyon."}]
ONCE: Any = {"model": "echo", "messages": ASK, "max_retries": 0}
MODES = [
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
]  # they send the schema
T = TypeVar("T")

by_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


class Level(StrEnum):
    LOW = "low"
    HIGH = "high"


class Address(BaseModel):
    street: str = Field(min_length=1)
    postcode: str = Field(pattern=r"^\d{5}$")


class User(BaseModel):
    """A person that is spoken of."""

    name: str
    age: int = Field(ge=18, le=150)


class Customer(User):
    address: Address
    level: Level
    channel: Literal["mail", "phone"]
    since: date
    balance: float | None = None
    nickname: str | None = None
    tags: list[str] = Field(min_length=1, max_length=2)
    scores: dict[str, int] = Field(default_factory=dict)
    manager: User | None = None


class Node(BaseModel):
    label: str
    children: list[Node]


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(min_length=2, max_length=2)


class Users(Page[User]):
    """With a name that OpenAI takes too: Page[User] is none."""


class Loose(BaseModel):
    """Any object is one."""

    name: str = ""
    age: int = 18


class Search(BaseModel):
    kind: Literal["search"]
    query: str


class Lookup(BaseModel):
    kind: Literal["lookup"]
    id: int = Field(ge=5)


class Action(BaseModel):
    action: Annotated[Search | Lookup, Field(discriminator="kind")]


class Weather(BaseModel):
    """The weather of a place."""

    location: str
    units: Literal["imperial", "metric"]


class Query(BaseModel):
    """A query of the web."""

    query: str


class Spaced(BaseModel):
    words: list[str] = Field(min_length=1)

    @field_validator("words", mode="after")
    @classmethod
    def kept(cls, words: list[str]) -> list[str]:
        return [word.strip() for word in words]


@pytest.fixture
def plain(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
        yield made


@by_mode
@pytest.mark.parametrize("model", [User, Customer, Node, Users, Action, Spaced], ids=lambda model: model.__name__)
def test_a_model_comes_at_the_first_attempt(
    plain: openai.OpenAI, mode: instructor.Mode, model: type[BaseModel]
) -> None:
    client = instructor.from_openai(plain, mode=mode)
    assert isinstance(client.create(response_model=model, **ONCE), model)


@by_mode
@pytest.mark.parametrize("form", [int, bool, float, str, Level, Literal["yes", "no"], list[int], list[User]], ids=str)
def test_simple_types(plain: openai.OpenAI, mode: instructor.Mode, form: Any) -> None:
    client = instructor.from_openai(plain, mode=mode)
    found = client.create(response_model=form, **ONCE)
    if form is Level:
        assert found in list(Level)
    elif form == Literal["yes", "no"]:
        assert found in ("yes", "no")
    elif form == list[int]:
        assert all(type(part) is int for part in found)
    elif form == list[User]:
        assert all(isinstance(part, User) for part in found)
    else:
        assert type(found) is form


def test_json_mode_makes_an_object(plain: openai.OpenAI) -> None:
    """The schema stands in words alone, here and at OpenAI."""
    client = instructor.from_openai(plain, mode=instructor.Mode.JSON)
    assert isinstance(client.create(response_model=Loose, **ONCE), Loose)
    assert isinstance(list(client.create_partial(response_model=Loose, **ONCE))[-1], Loose)


def test_markdown_with_a_form_beside_it(plain: openai.OpenAI) -> None:
    """This mode asks in words alone: a server that is not told of a form cannot enforce it."""
    client = instructor.from_openai(plain, mode=instructor.Mode.MD_JSON)
    found = client.create(response_model=User, extra_body={"guided_json": User.model_json_schema()}, **ONCE)
    assert found.age >= 18


@by_mode
def test_the_completion_beside_the_model(plain: openai.OpenAI, mode: instructor.Mode) -> None:
    client = instructor.from_openai(plain, mode=mode)
    user, completion = client.create_with_completion(response_model=User, **ONCE)
    assert isinstance(user, User)
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.choices[0].finish_reason == "stop"


@by_mode
def test_a_model_in_parts(plain: openai.OpenAI, mode: instructor.Mode) -> None:
    client = instructor.from_openai(plain, mode=mode)
    parts = list(client.create_partial(response_model=Customer, strict=False, **ONCE))  # strict takes no date of a text
    assert len(parts) > 5
    assert Customer.model_validate(parts[-1].model_dump())
    seen = [part.address.postcode if part.address else None for part in parts]
    assert seen[0] is None
    assert seen[-1] is not None


@by_mode
def test_models_one_after_another(plain: openai.OpenAI, mode: instructor.Mode) -> None:
    """Instructor's own schema does not require the list, and the echo model says no more than it must."""
    client = instructor.from_openai(plain, mode=mode)
    found = list(client.create_iterable(response_model=User, extra_body=with_tasks(mode), **ONCE))
    assert len(found) == 2
    assert all(isinstance(user, User) for user in found)


def with_tasks(mode: instructor.Mode) -> dict[str, Any]:
    """What is sent in place of Instructor's schema: two users are required."""
    schema = {
        "type": "object",
        "properties": {"tasks": {"type": "array", "items": User.model_json_schema(), "minItems": 2, "maxItems": 2}},
        "required": ["tasks"],
    }
    if mode is instructor.Mode.JSON_SCHEMA:
        return {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "IterableUser", "schema": schema},
            }
        }
    return {"tools": [{"type": "function", "function": {"name": "IterableUser", "parameters": schema}}]}


def test_an_iterable_as_a_type(plain: openai.OpenAI) -> None:
    client = instructor.from_openai(plain)
    body = with_tasks(instructor.Mode.TOOLS)
    found = list(client.create(response_model=Iterable[User], extra_body=body, **ONCE))
    assert len(found) == 2


def test_calls_side_by_side(plain: openai.OpenAI) -> None:
    """The model chooses here (tool_choice auto), and the echo model says a text: the choice is made for it."""
    client = instructor.from_openai(plain, mode=instructor.Mode.PARALLEL_TOOLS)
    found = list(
        client.create(response_model=Iterable[Weather | Query], extra_body={"tool_choice": "required"}, **ONCE)
    )
    assert found
    assert all(isinstance(call, Weather | Query) for call in found)


def test_a_client_by_its_provider(base_url: str) -> None:
    client = instructor.from_provider("openai/echo", base_url=base_url, api_key="none")
    assert isinstance(client.create(response_model=User, messages=ASK, max_retries=0), User)
    client.client.close()


def test_a_text_without_a_model(plain: openai.OpenAI) -> None:
    client = instructor.from_openai(plain)
    reply = client.create(response_model=None, model="echo", messages=ASK, max_tokens=4)
    assert reply.choices[0].message.content


async def test_the_asynchronous_twin(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
        assert isinstance(await client.create(response_model=Customer, **ONCE), Customer)
        tools = instructor.from_openai(plain)
        parts = [part async for part in tools.create_partial(response_model=User, **ONCE)]
        assert parts[-1].age >= 18


def test_a_cut_answer_is_told_as_one(plain: openai.OpenAI) -> None:
    client = instructor.from_openai(plain)
    with pytest.raises(IncompleteOutputException):
        client.create(response_model=Customer, max_tokens=5, **ONCE)
