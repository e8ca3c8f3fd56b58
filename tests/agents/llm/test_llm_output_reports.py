"""What a report says of a wrong answer: each field by its pointer, with what stands there and what to do.

Guards against the errors of every member of a union, pointers with pydantic's own words in them, megabytes of text for
the model to read, and a report that cannot be made because the answer is too odd.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diptych.agents import llm
from diptych.agents.llm.output import Output


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    bark: str
    legs: int = Field(le=4)


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    pets: list[Cat | Dog] = []
    size: int | str | None = None


def report_of(kind: Any, value: Any) -> llm.Report:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(llm.InvalidOutput) as failed:
        Output(kind).parse(text)
    assert failed.value.report.text == text
    return failed.value.report


def test_each_field_is_told_with_what_stands_there() -> None:
    report = report_of(Item, {"name": 3, "extra/one": [1]})
    assert [str(error) for error in report.errors] == [
        "/name: Input should be a valid string; found 3 (write a text in quotes)",
        "/extra~1one: Extra inputs are not permitted; found [1] (leave this field out)",
    ]
    assert report.value == {"name": 3, "extra/one": [1]}
    assert str(report_of(Item, {})) == "- /name: Field required; found nothing (add this field)"


def test_of_a_union_the_member_that_fits_best_is_told() -> None:
    """Not that a dog has no lives."""
    told = report_of(Item, {"name": "A", "pets": [{"kind": "dog", "bark": 3, "legs": 5}]})
    assert told.paths == ("/pets/0/bark", "/pets/0/legs")
    told = report_of(Item, {"name": "A", "pets": [{"kind": "cat"}, {"kind": "bird", "bark": "x", "legs": 2}]})
    assert told.paths == ("/pets/0/lives", "/pets/1/kind")


def test_where_no_member_is_of_the_kind_all_are_told_in_one() -> None:
    (error,) = report_of(Item, {"name": "A", "size": [1]}).errors
    assert error.path == "/size"
    assert "valid integer; or Input should be a valid string" in error.message
    assert error.found == "[1]"
    (error,) = report_of(Cat | int, "[]").errors
    assert error.path == ""


def test_paths_lead_through_the_wrapper_only_where_it_is() -> None:
    assert report_of(list[int], {"value": [1, "x"]}).paths == ("/value/1",)
    assert report_of(list[int], [1, "x"]).paths == ("/1",)
    assert report_of(dict[str, Cat], {"a/b": {"kind": "cat", "lives": "9"}}).paths == ("/a~1b/lives",)
    assert report_of(dict[int, int], {"x": 1}).paths == ("/x",)


def test_a_validators_own_words_are_told() -> None:
    def short(text: str) -> str:
        assert len(text) < 3, f"{text!r} has {len(text)} letters: write at most 2"
        return text

    class Span(BaseModel):
        begin: int
        end: int
        unit: Annotated[str, AfterValidator(short)] = "m"

        @model_validator(mode="after")
        def ordered(self) -> Span:
            if self.end < self.begin:
                raise ValueError("end lies before begin")
            return self

    report = report_of(Span, {"begin": 2, "end": 1})
    assert str(report) == '- the answer: end lies before begin; found {"begin": 2, "end": 1}'
    assert "'metres' has 6 letters: write at most 2" in str(report_of(Span, {"begin": 1, "end": 2, "unit": "metres"}))


def test_text_that_is_no_json_is_shown_where_it_stops_being_any() -> None:
    text = '{"name": "A", "pets": [' + '{"kind": "cat", "lives": 9},' * 100 + '{"kind": cat}]}'
    (error,) = report_of(Item, text).errors
    assert error.kind == "json_invalid"
    assert '"kind": cat' in error.found
    (error,) = report_of(Item, "I cannot say.").errors
    assert error.found == "I cannot say."
    assert error.hint == "answer with one JSON value and nothing else"


@pytest.mark.parametrize(
    "value",
    [
        {"name": ["x" * 100] * 20_000},
        {"name": "A", "pets": ["x" * 50] * 20_000},
        {"name": "A", **{f"field {at}": at for at in range(5000)}},
        {"name": "A", "x" * 1_000_000: 1},
        '{"name": "' + "x" * 1_000_000,
    ],
    ids=["long", "many", "fields", "key", "cut"],
)
def test_a_report_is_short_whatever_the_answer_holds(value: Any) -> None:
    report = report_of(Item, value)
    assert len(str(report)) < 30_000
    assert len(report.errors) <= 20
    assert len(report.errors) == 1 or report.num_more > 1000 or len(report.errors) + report.num_more < 5
    assert all(len(error.found) <= 203 for error in report.errors)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "pets", "kind", "size", "legs", "", "/"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_whatever_is_wrong_is_told_at_a_place_that_exists(value: Any) -> None:
    """A pointer leads to a value of the answer, or to a member that is missing in one."""
    report = None
    try:
        Output(dict[str, Item | list[Cat | Dog]]).parse(json.dumps(value))
    except llm.InvalidOutput as exc:
        report = exc.report
    if report is None:
        return
    assert report.errors
    for path in report.paths:
        at: Any = report.value
        steps = [step.replace("~1", "/").replace("~0", "~") for step in path.split("/")[1:]]
        for num, step in enumerate(steps):
            if isinstance(at, dict) and step not in at:
                assert num == len(steps) - 1
                break
            at = at[int(step)] if isinstance(at, list) else at[step]
