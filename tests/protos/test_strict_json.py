"""Bodies that no schema should have to see."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.protos.errors import InvalidRequest
from diptych.protos.strict_json import MAX_CONTAINERS, MAX_DEPTH, MAX_MEMBERS, parse_object, printable

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_every_honest_object_comes_back(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_an_object_or_invalid(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data), dict)
    except InvalidRequest:
        pass


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{}{}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"a":1,"a":2}', "appears twice"),
        (b'{"a":{"b":1,"b":1}}', "appears twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":Infinity}', "Infinity"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"\\udc00":1}', "surrogate"),
        (b'{"a":"\xff"}', "not UTF-8"),
        ('{"a":1}'.encode("utf-16"), "not UTF-8"),
        ("\ufeff{}".encode(), "not valid JSON"),
        (b'{"a":"\x00"}', "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, "nested"),
        (b'{"a":' * 200_000, "nested"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested"),
        (b'{"a":[' + b"[]," * MAX_CONTAINERS + b"1]}", "objects and lists"),
        (b"{" + b",".join(b'"%d" :1' % at for at in range(MAX_MEMBERS + 1)) + b"}", "members together"),
    ],
)
def test_a_bad_body_is_refused_with_its_reason(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        parse_object(body)


def test_brackets_within_strings_do_not_count_as_depth() -> None:
    text = '["{\\"' * 1000
    assert parse_object(json.dumps({"a": text}).encode()) == {"a": text}


def test_names_within_strings_do_not_count_as_members() -> None:
    text = '"a": ' * (MAX_MEMBERS + 1)
    assert parse_object(json.dumps({"a": text}).encode()) == {"a": text}


def test_what_is_too_much_is_blamed_on_the_field_that_holds_it() -> None:
    for body, param in (
        (b'{"x":[1,{"y":2}],"a":' + b"[" * (MAX_DEPTH + 1), "a"),
        (b'{"x":"a","b" : {"c":[' + b"[]," * MAX_CONTAINERS, "b"),
        (b'{"x":{"a":NaN}}', "a"),
        (b'{"x":{"a":[1]},"b":-1e400}', "b"),
        (b'{"b":[Infinity]}', None),
    ):
        with pytest.raises(InvalidRequest) as caught:
            parse_object(body)
        assert caught.value.param == param


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_object(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_nothing_unprintable_is_repeated_to_the_client() -> None:
    assert printable("a\nb\x1b[0m\ud800") == "a?b?[0m?"
    assert printable("x" * 100) == "x" * 80 + "..."
