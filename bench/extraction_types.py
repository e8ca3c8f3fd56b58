"""Twenty types that people extract, and what they are extracted from. typed_extractions.py asks for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Any, Generic, Literal, NotRequired, Optional, TypeVar
from uuid import UUID

from pydantic import BaseModel, Field
from typing_extensions import TypedDict  # pydantic wants it before Python 3.12

T = TypeVar("T")


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


class Address(BaseModel):
    street: str = Field(max_length=40)
    city: str = Field(max_length=30)
    postcode: str = Field(pattern=r"^[0-9]{5}$")


class Employee(Person):
    role: Literal["engineer", "writer", "manager"]
    address: Address


class Node(BaseModel):
    label: str = Field(max_length=12)
    child: Optional[Node] = None  # noqa: UP045  as many write it


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(max_length=3)
    next_page: int | None


class Mood(Enum):
    good = "good"
    bad = "bad"
    mixed = "mixed"


class Review(BaseModel):
    mood: Mood
    stars: Annotated[int, Field(ge=1, le=5)]
    words: list[Annotated[str, Field(max_length=12)]] = Field(max_length=4)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[Literal["sit", "roll", "fetch"]] = Field(max_length=3)


class Pet(BaseModel):
    animal: Cat | Dog = Field(discriminator="kind")


class Movie(TypedDict):
    title: Annotated[str, Field(max_length=40)]
    year: NotRequired[Annotated[int, Field(ge=1900, le=2030)]]


@dataclass
class Point:
    x: Annotated[float, Field(ge=-180, le=180)]
    y: Annotated[float, Field(ge=-90, le=90)]


class Invoice(BaseModel):
    number: Annotated[str, Field(pattern=r"^INV-[0-9]{4}$")]
    issued: date
    lines: dict[Annotated[str, Field(max_length=10)], Annotated[int, Field(ge=0, le=999)]] = Field(max_length=3)
    paid: bool


class Meeting(BaseModel):
    id: UUID
    attendees: list[Person] = Field(max_length=2)
    minutes: Literal[15, 30, 60]


class Colours(BaseModel):
    primary: tuple[Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]]
    name: str | None = Field(default=None, max_length=16)


class Recipe(BaseModel):
    dish: str = Field(max_length=30)
    steps: list[Annotated[str, Field(max_length=40)]] = Field(min_length=1, max_length=3)
    minutes: int = Field(gt=0, lt=300, multiple_of=5)


KINDS: dict[str, Any] = {
    "person": Person,
    "inheritance": Employee,
    "recursion": Node,
    "generic": Page[Person],
    "enum": Review,
    "discriminated": Pet,
    "typed_dict": Movie,
    "dataclass": Point,
    "invoice": Invoice,
    "meeting": Meeting,
    "tuple": Colours,
    "recipe": Recipe,
    "list": Annotated[list[Person], Field(max_length=2)],
    "union": Cat | Dog | Address,
    "literal": Literal["yes", "no", "maybe"],
    "integer": Annotated[int, Field(ge=0, le=1000)],
    "boolean": bool,
    "dict": Annotated[
        dict[Annotated[str, Field(max_length=8)], Annotated[int, Field(ge=0, le=9)]], Field(max_length=3)
    ],
    "optional": Address | None,
    "enum_list": Annotated[list[Mood], Field(min_length=1, max_length=4)],
}
_NAMES = ("Ada Lovelace", "Emil Braun", "Jun Sato", "Fatou Diop", "Olga Petrova")
_WORDS = ("great", "bad", "so so")
_PLACES = ("12 Elm Street, Springfield 62704", "Hauptstr. 5, Berlin 10115", "8 rue Verte, Lyon 69001")


def texts(name: str, number: int) -> list[str]:
    """`number` texts to extract `name` from, the same each time."""
    chance = random.Random(name)
    return [
        f"{chance.choice(_NAMES)}, {chance.randint(18, 90)} years old, an {chance.choice(('engineer', 'editor'))} "
        f"living at {chance.choice(_PLACES)}, met two friends for {chance.choice((15, 30, 60))} minutes on 2026-0"
        f"{chance.randint(1, 9)}-1{chance.randint(0, 9)}; invoice INV-{chance.randint(1000, 9999)} is paid. The dog "
        f"can sit and fetch. The soup took {5 * chance.randint(1, 20)} minutes and was {chance.choice(_WORDS)}."
        for _ in range(number)
    ]
