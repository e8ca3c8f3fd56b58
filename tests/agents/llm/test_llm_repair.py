"""Repair: a field that is wrong is made anew behind what stands before it; an answer that was cut off goes on.

Guards against: prefixes that end in the wrong place (escapes, duplicate keys, spaces), repairs of what has no place,
endless repairs of one field, servers that cannot go on, and tokens that are paid for twice.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator, model_validator

from diptych.agents import llm
from diptych.agents.llm.call import Call
from diptych.agents.llm.profiles import POOL, Profile
from diptych.agents.llm.repair import kept, known, place_of, resumable, steps_of
from diptych.agents.llm.reports import FieldError, Report, pointer
from diptych.agents.llm.testing import Said, ScriptedModel, failure, registry_of

TOO_NEW = {"title": "Emma", "year": 2015, "tags": ["novel"]}


class Book(BaseModel):
    title: str = Field(max_length=10)
    year: int
    tags: list[str] = []

    @field_validator("year")
    @classmethod
    def old(cls, year: int) -> int:
        if year > 1900:
            raise ValueError("too new")
        return year

    @model_validator(mode="after")
    def sound(self) -> Book:
        if self.title == "Persuasion" and self.year == 1:
            raise ValueError("these do not go together")
        return self


def asking(
    entries: list[Any], *, output: Any = Book, profile: Profile = POOL, retries: llm.Retries | None = None, **more: Any
) -> tuple[Call[..., Any, Any], ScriptedModel]:
    model = ScriptedModel(entries, profile=profile)

    @llm.call("a/m", output=output, registry=registry_of(a=model), retries=retries or llm.Retries(base_s=0), **more)
    def ask(text: str) -> str:
        return text

    return ask, model


def goes_on(body: dict[str, Any]) -> str | None:
    """The beginning that a request wants gone on with."""
    if not body.get("continue_final_message"):
        return None
    assert body["add_generation_prompt"] is False
    assert body["messages"][-1]["role"] == "assistant"
    return str(body["messages"][-1]["content"])


def test_one_field_is_made_anew() -> None:
    ask, model = asking([TOO_NEW, '1815,"tags":["classic"]}'])
    reply = ask("a book")
    assert reply.value == Book(title="Emma", year=1815, tags=["classic"])
    first, second = model.requests
    assert goes_on(first) is None
    assert goes_on(second) == '{"title": "Emma", "year":'
    assert second["response_format"] == first["response_format"]
    user, bad, told, _ = second["messages"]
    assert [user] == first["messages"]
    assert bad == {"role": "assistant", "content": json.dumps(TOO_NEW)}
    assert "/year: " in told["content"]
    assert [one.why for one in reply.attempts] == ["first", "repair"]
    assert reply.text == reply.attempts[-1].text == '{"title": "Emma", "year":1815,"tags":["classic"]}'
    assert reply.messages[-1].content == reply.text


def test_what_is_gone_on_from_has_no_beginning_left() -> None:
    ask, model = asking([TOO_NEW, "1815}", {"title": "Persuasion", "year": 1817}])
    again = ask("a book").resume("another")
    assert goes_on(model.requests[2]) is None
    assert again.value.title == "Persuasion"


def test_the_first_wrong_field_in_the_text_counts() -> None:
    class Pair(BaseModel):
        ok: int
        b: int = Field(lt=5)
        a: int = Field(lt=5)

    ask, model = asking(['{"ok":1,"a":9,"b":9}', '1,"b":1}'], output=Pair)
    assert ask("go").value == Pair(ok=1, a=1, b=1)
    assert goes_on(model.requests[1]) == '{"ok":1,"a":'


def test_a_field_within_lists_and_objects() -> None:
    class Shelf(BaseModel):
        books: list[Book]

    bad = {"books": [{"title": "Emma", "year": 1815}, {"title": "Dune", "year": 1965}, {"title": "x", "year": 1}]}
    ask, model = asking([bad, "1865}]}"], output=Shelf)
    assert [one.year for one in ask("go").value.books] == [1815, 1865]
    assert goes_on(model.requests[1]) == '{"books": [{"title": "Emma", "year": 1815}, {"title": "Dune", "year":'


def test_an_item_of_a_list_that_is_the_result() -> None:
    bad = '{"value":[{"title":"Emma","year":1815},{"title":"far too long","year":1}]}'
    ask, model = asking([bad, '"y","year":2}]}'], output=list[Book])
    assert [one.title for one in ask("go").value] == ["Emma", "y"]
    assert goes_on(model.requests[1]) == '{"value":[{"title":"Emma","year":1815},{"title":'


@pytest.mark.parametrize(
    "bad",
    [
        {"title": "Persuasion", "year": 1},  # the whole object
        {"title": "Emma"},  # nothing stands where it is missing
        {"title": "much too long for it", "year": 1815},  # nothing stands before it
        '{"title": "Emma", "year": ',  # no JSON
        '{"title": "Emma", "year": 2015, "year": 2016}',  # twice
        'Here: {"title": "Emma", "year": 2015}',  # not held to a form
        '["Emma", 2015]',
    ],
)
def test_where_no_field_can_be_made_anew_the_whole_is(bad: Any) -> None:
    ask, model = asking([bad, {"title": "Emma", "year": 1815}])
    reply = ask("a book")
    assert [one.why for one in reply.attempts] == ["first", "reask"]
    assert goes_on(model.requests[1]) is None
    assert len(model.requests[1]["messages"]) == 3


def test_a_result_that_is_one_value_is_asked_for_anew() -> None:
    """Its path is not empty, because it lies in an object; there is nothing to keep."""
    ask, model = asking(['{"value": 9}', '{"value": 3}'], output=Annotated[int, Field(lt=5)])
    assert ask("go").value == 3
    assert goes_on(model.requests[1]) is None


@pytest.mark.parametrize("how", ["profile", "retries"])
def test_not_where_it_is_not_wanted_or_cannot_be(how: str) -> None:
    profile = Profile(media=POOL.media, continues="prefill") if how == "profile" else POOL
    retries = llm.Retries(repair=how != "retries", base_s=0)
    ask, model = asking([TOO_NEW, {"title": "Emma", "year": 1815}], profile=profile, retries=retries)
    assert [one.why for one in ask("a book").attempts] == ["first", "reask"]
    assert goes_on(model.requests[1]) is None


def test_not_within_a_form_of_the_developers_own() -> None:
    ask, _ = asking([TOO_NEW, {"title": "Emma", "year": 1815}], options={"pool": {"guided_regex": ".*"}})
    assert [one.why for one in ask("a book").attempts] == ["first", "reask"]


def test_a_field_that_stays_wrong_is_given_up() -> None:
    """The model may need to say something else before it."""
    ask, model = asking([TOO_NEW, "2016}", TOO_NEW, "1815}"], retries=llm.Retries(attempts=4))
    reply = ask("a book")
    assert [one.why for one in reply.attempts] == ["first", "repair", "reask", "repair"]
    assert len(model.requests[2]["messages"]) == 5
    assert model.requests[2]["messages"][3]["content"] == '{"title": "Emma", "year":2016}'


def test_another_field_behind_it_is_repaired_next() -> None:
    class Three(BaseModel):
        a: int
        b: int = Field(lt=5)
        c: int = Field(lt=5)

    ask, model = asking(['{"a":1,"b":9,"c":9}', '2,"c":9}', "3}"], output=Three)
    reply = ask("go")
    assert reply.value == Three(a=1, b=2, c=3)
    assert [goes_on(body) for body in model.requests] == [None, '{"a":1,"b":', '{"a":1,"b":2,"c":']


def test_a_network_failure_in_a_repair_sends_the_same_again() -> None:
    ask, model = asking([TOO_NEW, failure("connect"), "1815}"])
    assert [one.why for one in ask("a book").attempts] == ["first", "repair", "retry"]
    assert model.requests[1] == model.requests[2]


def test_a_server_that_cannot_go_on_is_asked_in_words() -> None:
    """A refusal of continue_final_message ended the call as a bad request."""
    ask, model = asking([TOO_NEW, failure("bad_request", status=400), TOO_NEW, {"title": "Emma", "year": 1815}])
    ask = ask.with_(retries=llm.Retries(attempts=4))
    reply = ask("a book")
    assert [one.why for one in reply.attempts] == ["first", "repair", "reask", "reask"]
    assert [goes_on(body) is None for body in model.requests] == [True, False, True, True]
    assert model.requests[2]["messages"] == model.requests[1]["messages"][:-1]
    ask, _ = asking([failure("bad_request", status=400)])
    with pytest.raises(llm.ProviderError):  # one that had no beginning is wrong
        ask("a book")


def test_an_answer_that_was_cut_off_goes_on() -> None:
    half = Said(text='{"title":"Emma","ye', thoughts="hm", finish="length")
    ask, model = asking([half, 'ar":1815}'], max_tokens=8)
    reply = ask("a book")
    assert reply.value == Book(title="Emma", year=1815)
    assert [one.why for one in reply.attempts] == ["first", "longer"]
    assert goes_on(model.requests[1]) == half.text
    assert model.requests[1]["messages"][-1]["reasoning_content"] == "hm"
    assert [body["max_completion_tokens"] for body in model.requests] == [8, 8]
    assert reply.spent.output_tokens == 10  # 5 and 5: none of them twice


def test_it_goes_on_once() -> None:
    half = Said(text='{"title":"Em', finish="length")
    ask, _ = asking([half, Said(text='ma","year":18', finish="length")], max_tokens=4)
    with pytest.raises(llm.Truncated) as caught:
        ask("a book")
    assert caught.value.text == '{"title":"Emma","year":18'
    assert caught.value.partial == {"title": "Emma"}


def test_a_server_that_cannot_go_on_is_asked_for_more() -> None:
    half = Said(text='{"title":"Em', finish="length")
    ask, model = asking([half, failure("unsupported"), {"title": "Emma", "year": 1815}], max_tokens=4)
    assert [one.why for one in ask("a book").attempts] == ["first", "longer", "longer"]
    assert goes_on(model.requests[2]) is None
    assert model.requests[2]["max_completion_tokens"] == 8


def test_a_fallback_does_not_go_on_from_anothers_beginning() -> None:
    first = ScriptedModel([TOO_NEW, failure("auth")])
    second = ScriptedModel([{"title": "Emma", "year": 1815}])
    retries = llm.Retries(fallback=["b/m"], base_s=0)

    @llm.call("a/m", output=Book, registry=registry_of(a=first, b=second), retries=retries)
    def ask() -> str:
        return "a book"

    assert ask().model == "b/m"
    assert second.requests[0]["messages"] == first.requests[0]["messages"]
    assert goes_on(second.requests[0]) is None


def test_in_a_stream_the_whole_answer_follows_a_restart() -> None:
    ask, _ = asking([TOO_NEW, '1815,"tags":[]}'])
    stream = ask.stream("a book")
    texts, restarts = [""], []
    for event in stream:
        if isinstance(event, llm.Restarted):
            restarts.append((event.number, event.why))
            texts.append("")
        texts[-1] += getattr(event, "text", "") if type(event).__name__ == "Content" else ""
    assert restarts == [(2, "repair")]
    assert texts == [json.dumps(TOO_NEW), '{"title": "Emma", "year":1815,"tags":[]}']
    assert stream.reply().value.year == 1815


# Places in JSON.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def paths(value: Any, before: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    found = [before]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        found += paths(inner, (*before, step))
    return found


def at(value: Any, steps: tuple[object, ...]) -> Any:
    for step in steps:
        value = value[step]
    return value


@given(JSON, st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=60)
def test_every_value_is_found_where_it_begins(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    for steps in paths(value):
        path = pointer(steps)
        place = place_of(text, steps_of(path))
        assert place is not None
        found, _ = json.JSONDecoder().raw_decode(text, place)
        assert found == at(value, steps)


@pytest.mark.parametrize("path", ["/b", "/a/3", "/a/x", "/a/0/c", "/a/-1", "/a/\u0661", "/"])
def test_what_is_not_there_has_no_place(path: str) -> None:
    assert place_of('{"a": [1, 2, 3]}', steps_of(path)) is None


@given(st.text(alphabet='{}[]",:\\ 1a\n', max_size=30), st.lists(st.sampled_from(["a", "0", "1", ""]), max_size=3))
@settings(max_examples=100)
def test_no_text_breaks_the_search(text: str, steps: list[str]) -> None:
    place_of(text, steps)
    known(text)
    resumable(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, "b": "x', {"a": 1}),
        ('{"a": [1, {"b": 2}, {"c": 12', {"a": [1, {"b": 2}, {}]}),
        ('{"a": 1, "b": -', {"a": 1}),
        ('{"a": 1.5e', {}),
        ('{"a": "7', {}),
        ('{"a": "x7"', {"a": "x7"}),
        ("so: [1, 2", [1]),
        ("", None),
        ("no", None),
    ],
)
def test_what_is_known_of_a_text_that_was_cut_off(text: str, value: Any) -> None:
    """A number at the end may have had more digits."""
    assert known(text) == value


def test_half_a_character_is_left_out() -> None:
    assert resumable('{"a": "x\ufffd') == '{"a": "x'
    assert resumable('{"a": 1,   \n\n') == '{"a": 1,'
    assert resumable(" \n") == ""


def test_deep_nesting_has_no_place() -> None:
    """It ended in a RecursionError."""
    text = '{"b":' + "[" * 50_000 + "]" * 50_000 + ',"c":1}'
    error = FieldError("/c", "value_error", "no", "1")
    assert kept(Report((error,), text, {}, True)) == ""
