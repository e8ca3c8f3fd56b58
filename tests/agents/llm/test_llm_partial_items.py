"""Items of a list as they close.

Guards against an item that is given twice or never, one that is given before it is whole or without its validators, a
restart that nobody notices, and prose that is taken for items.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationInfo, field_validator

from diptych.agents import llm
from diptych.agents.llm.assembling import Items
from diptych.agents.llm.output import Output
from diptych.agents.llm.testing.scripted import Said, ScriptedModel, failure
from diptych.protos.deltas import Content


class Cat(BaseModel):
    kind: Literal["cat"]
    name: str

    @field_validator("name")
    @classmethod
    def allowed(cls, name: str, info: ValidationInfo) -> str:
        if info.context and name not in info.context:
            raise ValueError(f"no cat is called {name}")
        return name


class Dog(BaseModel):
    kind: Literal["dog"]
    legs: int = 4


CATS = [{"kind": "cat", "name": "Tom"}, {"kind": "cat", "name": "Kit"}]
Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


def asked(kind: Any, *entries: Any, **given: Any) -> Any:
    registry = llm.Registry(environ={})
    model = ScriptedModel(entries)
    registry.add("test", model)

    @llm.call("test/m", output=kind, registry=registry, **{"retries": llm.Retries(base_s=0), **given})
    def ask() -> str:
        return "?"

    return ask, model


def given_by(kind: Any, pieces: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Behind which piece each item came."""
    items: Items[Any] = Items(Output(kind), "ask")
    for at, piece in enumerate(pieces):
        for item in items.taken(Content(piece)):
            yield at, item


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (list[Cat], CATS),
        (Iterable[Cat], CATS),
        (list[Pet], [*CATS, {"kind": "dog"}]),
        (list[Cat | Dog], [*CATS, {"kind": "dog", "legs": 3}]),
        (list[int], [1, -2, 30]),
        (list[str], ["a,b", "]", '"', ""]),
        (list[list[int]], [[], [1, [2]][:1], [3]]),
        (set[str], ["x"]),
        (tuple[bool, ...], [True, False]),
        (list[dict[str, Any]], [{}, {"value": [1]}]),
        (list[Any], [None, {"a": []}, 1.5]),
        (list[int], []),
    ],
    ids=str,
)
async def test_each_item_comes_once_and_typed(kind: Any, values: list[Any]) -> None:
    ask, model = asked(kind, *[{"value": values}] * 2, values)
    wanted = list(ask().value) if values else []
    stream = ask.stream()
    assert sorted(map(repr, stream.items())) == sorted(map(repr, wanted))
    assert model.open_streams == 0
    assert sorted(map(repr, [item async for item in ask.stream().items()])) == sorted(map(repr, wanted))


def test_an_item_comes_with_the_piece_that_closes_it() -> None:
    pieces = ['Here: {"value": [{"kind":"cat",', '"name":"Tom"', "}", ' , {"kind":"cat","name":"Kit"}', "]}"]
    assert [at for at, _ in given_by(list[Cat], pieces)] == [2, 3]
    assert list(given_by(list[int], ["[1", "2, ", "3", "]"])) == [(1, 12), (3, 3)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2), max_size=5),
    st.lists(st.integers(0, 10**6), max_size=6),
    st.booleans(),
)
def test_however_it_is_cut_the_items_are_the_list(values: list[Any], places: list[int], is_wrapped: bool) -> None:
    text = json.dumps({"value": values} if is_wrapped else values, indent=len(places) % 2 or None)
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    assert [item for _, item in given_by(list[Any], [text[a:b] for a, b in pairwise(edges)])] == values


def test_one_that_is_wrong_is_told_with_its_place() -> None:
    ask, model = asked(list[Cat], {"value": [*CATS, {"kind": "cat", "name": 3}]})
    items = iter(ask.stream().items())
    assert [next(items).name, next(items).name] == ["Tom", "Kit"]
    with pytest.raises(llm.InvalidOutput, match="the answer is no Cat") as failed:
        next(items)
    assert failed.value.report.paths == ("/value/2/name",)
    assert failed.value.report.text == '{"kind": "cat", "name": 3}'
    assert model.open_streams == 0


def test_validators_get_the_context_of_the_call() -> None:
    ask, _ = asked(list[Cat], {"value": CATS}, validation={"Tom"})
    items = iter(ask.stream().items())
    assert next(items).name == "Tom"
    with pytest.raises(llm.InvalidOutput, match="no cat is called Kit"):
        next(items)


def test_a_restart_gives_no_item_twice() -> None:
    """The answer begins with the same: the rest comes; with another: what was given cannot be taken back."""
    text = json.dumps({"value": CATS})
    broken = Said(text=text, cut=failure("server"), cut_after=len(text[:-2]) // 4 + 1)
    ask, model = asked(list[Cat], broken, Said(text=text))
    assert [cat.name for cat in ask.stream().items()] == ["Tom", "Kit"]
    assert len(model.requests) == 2
    ask, _ = asked(list[Cat], broken, {"value": [{"kind": "cat", "name": "Eve"}]})
    with pytest.raises(llm.ProviderError, match="scripted"):
        list(ask.stream().items())


def test_only_a_list_has_items() -> None:
    for kind in (Cat, dict[str, int], tuple[int, str], int, llm.Maybe[list[int]]):
        with pytest.raises(llm.UsageError, match=r"items\(\) is of a result that is a list"):
            Items(Output(kind), "ask")


def test_text_that_is_hostile_gives_nothing() -> None:
    for text in (
        "[" * 5000,
        '{"value": [' * 1000,
        '{"value": {"value": [1]}}',
        '{"other": [1, 2]}',
        "] [",
        "",
    ):
        assert not [item for _, item in given_by(list[Cat], [text])]
