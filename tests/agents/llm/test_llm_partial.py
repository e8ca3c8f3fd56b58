"""What is known of a result while it comes.

Guards against a default or a None that nobody said, half a word of a fixed list, half an escape, work that grows
faster than the text, a view that differs by where the text was cut or who tells the parts, and what a restart leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from enum import Enum
from itertools import pairwise
from typing import Any, Generic, Literal, NamedTuple, Optional, TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import AliasPath, BaseModel, ConfigDict, Field, RootModel, ValidationInfo, field_validator
from typing_extensions import TypedDict

from diptych.agents import llm
from diptych.agents.llm.assembling import Assembler, known_parts
from diptych.agents.llm.output import Output
from diptych.agents.llm.partial import plain
from diptych.agents.llm.testing.scripted import Said, ScriptedModel, failure, with_parts
from diptych.protos.deltas import Content

T = TypeVar("T")
UNSET = llm.UNSET


class Level(Enum):
    LOW = "low"
    LOWER = "lower"


class City(BaseModel):
    name: str
    size: int = 7


class Film(TypedDict, total=False):
    title: str
    cast: list[City]


class Point(NamedTuple):
    x: int
    y: City


@dataclass
class Box:
    width: float
    city: City


class Pair(BaseModel, Generic[T]):
    left: T
    right: T


class User(BaseModel):
    name: str
    level: Level = Level.LOW
    kind: Literal["a", "ab"] | None = None
    born: date | None = None
    home: City | None = None
    friends: list[User] = []
    by_name: dict[str, City] = {}
    boss: Optional[User] = None  # noqa: UP045  a name of itself
    other: City | Box | str | None = None
    note: str | int = ""


def views(kind: Any, pieces: list[str], *, grows: bool = True, told: bool = False) -> Iterator[Any]:
    """Each, as it was then."""
    assembler = Assembler(Output(kind), grows=grows)
    for event in with_parts([Content(piece) for piece in pieces]) if told else [Content(piece) for piece in pieces]:
        assembler.add(event)
        for found in assembler.taken():
            yield plain(found)


def last(kind: Any, text: str, **given: Any) -> Any:
    """The view behind all of `text`."""
    assembler = Assembler(Output(kind), grows=given.get("grows", True))
    assembler.add(Content(text))
    return assembler.known


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def test_what_is_not_known_is_unset_and_nothing_else() -> None:
    view = last(User, '{"name":"Ann","home":{"name":"Ul')
    assert view.name == "Ann"
    assert view.level is view.born is view.friends is view.boss is UNSET
    assert view.home.name == "Ul"
    assert view.home.size is UNSET
    assert view.to_dict() == {"name": "Ann", "home": {"name": "Ul"}}
    assert repr(view.home) == "Partial[City](name='Ul', size=Unset)"
    with pytest.raises(AttributeError, match="has no 'nam': its fields are name, size"):
        _ = view.home.nam
    with pytest.raises(AttributeError):
        view.name = "Eve"


def test_views_are_equal_by_what_they_know() -> None:
    assert last(City, '{"name":"Ulm"') == last(City, ' {"name": "Ulm"')
    assert last(City, '{"name":"Ulm"') != last(City, '{"name":"Ulm","size":1}')
    assert last(City, '{"name":"Ulm"') != {"name": "Ulm"}


def test_texts_grow_and_words_and_numbers_come_whole() -> None:
    text = json.dumps({"name": "Anna", "level": "lower", "kind": "ab", "born": "2001-02-03", "note": "hey", "x": 12})
    seen = list(views(User, list(text)))
    assert [view["name"] for view in seen][:4] == ["A", "An", "Ann", "Anna"]
    assert {view.get("level") for view in seen} == {None, "lower"}
    assert {view.get("kind") for view in seen} == {None, "ab"}
    assert {view.get("born") for view in seen} == {None, "2001-02-03"}
    assert {view.get("note") for view in seen} == {None, "h", "he", "hey"}
    assert {view.get("x") for view in seen} == {None, 12}
    assert next(views(User, list(text), grows=False))["name"] == "Anna"


@pytest.mark.parametrize("text", ["\u00e9\U0001f600!", 'a"b\\c\n', "\\ud83d", "\U0001f600\U0001f600", "\\\\u00e9", "/"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_half_an_escape_or_half_a_pair_is_never_shown(text: str, ascii_only: bool) -> None:
    seen = [view["name"] for view in views(City, list(json.dumps({"name": text}, ensure_ascii=ascii_only)))]
    assert seen[-1] == text
    assert all(text.startswith(one) for one in seen)


def test_fields_are_found_by_the_names_of_the_wire() -> None:
    class Named(BaseModel):
        model_config = ConfigDict(populate_by_name=True, extra="allow")
        first: str = Field(alias="firstName")
        deep: int = Field(validation_alias=AliasPath("a", 1))
        to_dict: str = ""
        value: int = 3

    view = last(Named, '{"firstName":"A","a":[1,2],"to_dict":"mine","value":4,"more":true}')
    assert (view.first, view.deep, view.to_dict, view.value, view.more) == ("A", 2, "mine", 4, True)
    assert llm.Partial.to_dict(view)["firstName"] == "A"
    assert last(Named, '{"first":"B"').first == "B"


def test_objects_inside_are_views_wherever_their_type_tells() -> None:
    view = last(
        User,
        '{"friends":[{"name":"B","boss":{"name":"C"}}],"by_name":{"x":{"name":"U"}},"other":{"width":1,"city":{"name":"N"}}}',
    )
    assert view.friends[0].boss.name == "C"
    assert view.by_name["x"].name == "U"
    assert view.other.city.name == "N"
    assert view.other.size is UNSET
    assert last(Pair[City], '{"left":{"name":"L"').left.name == "L"
    assert last(Box, '{"width":1,"city":{"name":"W').city.name == "W"
    assert last(list[City], '{"value":[{"name":"W"},{"name":"V').pop().name == "V"
    assert last(Film, '{"title":"M","cast":[{"name":"P"')["cast"][0].name == "P"
    assert last(Point, '{"value":[1,{"name":"P"')[1].name == "P"
    assert last(City | User, '{"value":{"name":"P"').size is UNSET
    assert last(RootModel[list[City]], '{"value":[{"name":"R"')[0].name == "R"
    assert last(dict[str, int], '{"a":1,"b":2') == {"a": 1}
    assert last(list[int], "[1, 2, 3") == [1, 2]
    assert last(int | None, '{"value":null') is UNSET
    assert last(int | None, '{"value":null}') is None
    assert last(llm.Maybe[City], '{"is_known":true,"why":"w","value":{"name":"P').value.name == "P"


def test_a_part_that_is_final_is_told_so() -> None:
    view = last(User, '{"name":"Ann","friends":[{"name":"B"},{"name":"C","boss":{"name":"D"}')
    assert view.is_final("/name")
    assert view.is_final("/friends/0")
    assert view.friends[0].is_final()
    assert view.friends[1].boss.is_final("/name")
    assert view.friends[1].is_final("/boss")
    assert not any(view.is_final(path) for path in ("", "/friends", "/friends/1", "/friends/2", "/level", "/name/x"))
    growing = last(User, '{"name":"An')
    assert not growing.is_final("/name")
    with pytest.raises(llm.UsageError, match='for example "/name"'):
        view.is_final("name")


def test_a_closed_object_is_validated_when_asked() -> None:
    class Known(BaseModel):
        name: str
        born: date

        @field_validator("name")
        @classmethod
        def known(cls, name: str, info: ValidationInfo) -> str:
            if info.context and name not in info.context:
                raise ValueError(f"nobody knows {name}")
            return name

    class Group(BaseModel):
        people: list[Known]
        title: str = ""

    assembler = Assembler(Output(Group), lambda: {"Ann"})
    assembler.add(
        Content('{"people":[{"name":"Ann","born":"2001-02-03"},{"name":"Eve","born":"2001-02-03"},{"name":"Ann"')
    )
    first, second, third = assembler.known.people
    assert first.validated() == Known(name="Ann", born=date(2001, 2, 3))
    with pytest.raises(llm.InvalidOutput, match="nobody knows Eve"):
        second.validated()
    with pytest.raises(llm.UsageError, match="it is not complete"):
        third.validated()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["", "0", "1", "a/b", "~", "name", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.text(max_size=3), VALUES, max_size=4), st.lists(st.integers(0, 10**6), max_size=8), st.booleans()
)
@example({"a": {"0": 1, "1": 2}, "b": {"0": [1]}, "c": [[], {}]}, [7, 19], True)
@example({"0": {"0": {"x": "\U0001f600"}}}, [], False)
def test_however_it_is_cut_and_whoever_tells_it_the_end_is_the_whole(
    value: dict[str, Any], places: list[int], ascii_only: bool
) -> None:
    """An object whose first key is "0" is told by pointers like a list."""
    pieces = cut(json.dumps(value, ensure_ascii=ascii_only), places)
    for grows, told in ((True, False), (False, False), (False, True)):
        seen = list(views(dict[str, Any], pieces, grows=grows, told=told))
        assert json.dumps(seen[-1], sort_keys=True) == json.dumps(value, sort_keys=True)
        for before, after in pairwise(seen):
            assert is_beginning(before, after, grows), (before, after)


def is_beginning(before: Any, after: Any, grows: bool) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return all(key in after and is_beginning(one, after[key], grows) for key, one in before.items())
    if isinstance(before, list) and isinstance(after, dict):  # told by pointers, it could have been one
        return all(is_beginning(one, after[str(at)], grows) for at, one in enumerate(before))
    if isinstance(before, list) and isinstance(after, list):
        return len(before) <= len(after) and all(is_beginning(a, b, grows) for a, b in zip(before, after, strict=False))
    if grows and isinstance(before, str) and isinstance(after, str):
        return after.startswith(before)
    return json.dumps(before) == json.dumps(after)


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet='[]{}",:\\x1u ', max_size=40), st.integers(0, 40))
def test_whatever_comes_nothing_is_raised(text: str, place: int) -> None:
    for kind in (User, list[City], int):
        for grows in (True, False):
            list(views(kind, [text[:place], text[place:]], grows=grows))
            known_parts(Output(kind), text)


def test_of_json_in_prose_the_last_counts() -> None:
    text = 'I used {x}. ```json\n{"name": "A"}\n``` No, better: {"name": "B", "size": 2}'
    seen = list(views(City, list(text)))
    assert seen[0] == {"name": "A"}
    assert seen[-1] == {"name": "B", "size": 2}
    assert last(City, '{"name": "A"} and then {oops') == last(City, '{"name": "A"}')


def test_of_two_members_of_one_name_the_last_counts() -> None:
    assert plain(last(User, '{"name":"A","name":"B","home":{"size":1},"home":{"name":"C"}}')) == {
        "name": "B",
        "home": {"name": "C"},
    }


def test_an_empty_object_is_known_when_it_is_closed() -> None:
    assert list(views(Film, ["{", "}"])) == [{}]
    assert set(map(str, views(Film, ["{", "}"], grows=False, told=True))) == {"{}"}


def test_depth_and_length_are_no_danger() -> None:
    assert last(dict[str, Any], '{"a":' * 10_000 + "1" + "}" * 10_000) is UNSET
    assert last(list[Any], "[" * 10_000) is UNSET
    assert last(City, '{"name":"' + "x" * 1_000_000).name == "x" * 1_000_000


def test_a_long_text_is_not_copied_at_each_piece() -> None:
    """Characters that are shown, summed: a view at each of the 50,000 pieces would copy five thousand million."""
    assembler = Assembler(Output(City), grows=True)
    pieces, copied, num_views = ['{"name":"', *["abcd"] * 50_000, '"}'], 0, 0
    for piece in pieces:
        assembler.add(Content(piece))
        for view in assembler.taken():
            copied, num_views = copied + len(view.name), num_views + 1
    assert assembler.known.name == "abcd" * 50_000
    assert num_views > 1000
    assert copied < 1100 * 200_000


def test_what_is_told_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.agents.llm.json_text import JsonFinder

    read: list[str] = []
    feed = JsonFinder.feed

    def noted(self: Any, text: str) -> Any:
        read.append(text)
        return feed(self, text)

    monkeypatch.setattr(JsonFinder, "feed", noted)
    value = {"name": "Ann", "friends": [{"name": "B"}, {"name": "C"}], "home": {"name": "U", "size": 1}}
    pieces = list(json.dumps(value))
    seen = list(views(User, pieces, grows=False, told=True))
    assert seen[-1] == value
    assert "".join(read) == '{"name": "Ann"'


def test_the_complete_parts_of_an_answer_that_was_cut_off() -> None:
    text = 'Sure: {"name": "Ann", "home": {"name": "Ulm", "size": 12'
    assert known_parts(Output(User), text) == {"name": "Ann", "home": {"name": "Ulm"}}
    assert known_parts(Output(list[int]), '{"value": [1, 2, 3') == [1, 2]
    assert known_parts(Output(User), "I cannot") is None


def asked(kind: Any, *entries: Any, **given: Any) -> Any:
    model = ScriptedModel(entries)
    registry = llm.Registry(environ={})
    registry.add("test", model)

    @llm.call("test/m", output=kind, registry=registry, **{"retries": llm.Retries(base_s=0), **given})
    def ask() -> str:
        return "?"

    return ask, model


VALUE = {"name": "Ann", "friends": [{"name": "B"}], "home": {"name": "U", "size": 1}}


@pytest.mark.parametrize("grow", [True, False])
async def test_a_stream_gives_views_both_ways(grow: bool) -> None:
    """Thoughts come first and are none of it; the finished parts are asked for where they are what is read."""
    ask, model = asked(User, *[Said(text=json.dumps(VALUE), thoughts='{"name":"no"}')] * 2)
    stream = ask.stream()
    seen = [view async for view in stream.partials(grow=grow)]
    assert seen[-1].to_dict() == VALUE
    assert seen[-1].validated() == (await stream.reply.aio()).value
    assert all(view is seen[0] for view in seen)
    assert [request.get("structured") for request in model.requests] == [None if grow else True]
    assert model.open_streams == 0


def test_a_stream_gives_views_where_nobody_waits() -> None:
    ask, model = asked(User, VALUE, VALUE)
    with ask.stream() as stream:
        seen = [view.to_dict() for view in stream.partials()]
    assert seen[-1] == VALUE
    assert stream.reply().value.name == "Ann"
    for view in ask.stream().partials():
        assert view.name
        break
    assert model.open_streams == 0


def test_a_restart_begins_a_new_view_and_leaves_the_old_one() -> None:
    broken = Said(text=json.dumps(VALUE), cut=failure("server"), cut_after=6)
    ask, _ = asked(User, broken, {"name": "Eve", "home": {"name": "V"}})
    old, *_, new = ask.stream().partials()
    assert old.name.startswith("A")
    assert old.home is UNSET
    assert new.to_dict() == {"name": "Eve", "home": {"name": "V"}}


def test_an_answer_that_goes_on_from_its_beginning_is_told_in_parts_too() -> None:
    """The cluster tells the parts of what is new alone; what stands before it is in the text."""
    assembler = Assembler(Output(User))
    assembler.add(Content('{"name":"Ann","home":{"name":"U",'))
    rest = with_parts([Content('{"name":"Ann","home":{"name":"U",'), Content('"size":1}}')])[-2:]
    for event in rest:
        assembler.add(event)
    assert plain(assembler.known) == {"name": "Ann", "home": {"name": "U", "size": 1}}
    assert assembler.known.home.is_final()


def test_a_reader_that_is_slow_is_not_shown_each_step() -> None:
    """What waits for it is one step, however many pieces it came in."""
    ask, _ = asked(User, Said(text=json.dumps(VALUE), pieces=tuple(json.dumps(VALUE))))
    stream = ask.stream()
    flow = iter(stream.partials())
    stream._has_more = True
    num_views = sum(1 for _ in flow)
    assert 1 <= num_views <= len(json.dumps(VALUE))
    assembler = Assembler(Output(User), grows=True)
    for piece in json.dumps(VALUE):
        assembler.add(Content(piece))
    assert len(list(assembler.taken())) == 1
    assert not list(assembler.taken())


def test_a_refusal_and_a_cut_have_views_until_they_fail() -> None:
    ask, _ = asked(User, Said(text='{"name": "An', finish="length"), retries=llm.Retries(attempts=1, longer=False))
    seen = []
    with pytest.raises(llm.Truncated):
        seen += ask.stream().partials()
    ask, _ = asked(User, Said(text='{"name": "An', finish="content_filter"), retries=llm.Retries(attempts=1))
    with pytest.raises(llm.Refused):
        list(ask.stream().partials())


def test_what_has_no_parts_says_so() -> None:
    ask, _ = asked(None, "hello")
    with pytest.raises(llm.UsageError, match=r"ask: partials\(\) is of calls with a result's type"):
        ask.stream().partials()
    ask, _ = asked(User, VALUE)
    with pytest.raises(llm.UsageError, match=r"ask: items\(\) is of a result that is a list, and this one is User"):
        ask.stream().items()
