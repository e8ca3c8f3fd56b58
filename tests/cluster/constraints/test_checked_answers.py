"""The check after an answer says what is wrong and where, of any text, in bounded time."""

from __future__ import annotations

import time

import pytest

from diptych.cluster.constraints.kept import Newest
from diptych.cluster.constraints.validate import MAX_ERRORS, Validator, validator

SCHEMA = {"type": "object", "properties": {"items": {"type": "array", "items": {"required": ["price"]}}}}


def test_errors_tell_the_place_in_the_answer() -> None:
    """ "is not valid" of a list of 200 objects helps neither a person nor a model that is to repair it."""
    assert Validator(SCHEMA).errors('{"items": [{"price": 1}, {}]}') == ['items[1]: "price" is a required property']
    assert Validator(SCHEMA).errors('{"items": []}') == []
    assert len(Validator({"items": {"type": "string"}}).errors(str(list(range(100))))) == MAX_ERRORS


ODD = [
    "",
    "{",
    "[" * 100_000,
    '{"a": 1, "a": 2}',
    "NaN",
    '{"a":' + "9" * 5000 + "}",
    '"\\ud800"',
    "1e999999",
    "9E2648271310837813009467045489276673",
    "\x00",
]
DEEP = '{"a":' + "[" * 400 + "]" * 400 + "}"


@pytest.mark.parametrize("text", [*ODD, DEEP, '{"a":1}x'], ids=lambda text: text[:20])
def test_any_text_has_an_answer(text: str) -> None:
    """A RecursionError or a number of 5,000 digits in an answer ended the request with a 500."""
    assert all(isinstance(problem, str) for problem in Validator({"type": "object"}).errors(text))
    is_object = text.startswith('{"a":[') or text == '{"a": 1, "a": 2}'  # the last of equal names counts
    assert bool(Validator({"type": "object"}).errors(text)) is not is_object


@pytest.mark.parametrize("pattern", ["^(a+)+$", "(x+x+)+y", "^(?:(?=a)(a|a)*)*b$", "(x+x+)+y(?!z)", "^(?=(a+)+$)"])
def test_no_pattern_takes_the_router_long(pattern: str) -> None:
    """`(a+)+$` over 50 kB of an answer kept the event loop for minutes."""
    started = time.process_time()
    check = Validator({"type": "string", "pattern": pattern})
    check.errors('"' + "a" * 50_000 + '!"')
    check.errors('"' + "x" * 50_000 + '"')
    assert time.process_time() - started < 2.0


def test_lone_braces_are_taken_where_meta_schemas_do_not() -> None:
    """`{{name}}` in a pattern of a draft-04 schema made every answer unverifiable."""
    schema = {"$schema": "http://json-schema.org/draft-04/schema#", "pattern": ".*\\{\\{.+}}.*"}
    assert Validator(schema).errors('"{{a}}"') == []
    assert Validator(schema).errors('"a"')


def test_validators_kept_are_bounded() -> None:
    """10,000 tenants with a schema each filled the router's memory."""
    kept = Newest[Validator](max_count=16, max_bytes=1000)
    for number in range(100):
        validator({"const": number, "$comment": "x" * (number % 7) * 40}, kept=kept)
    assert 0 < len(kept) <= 16
    assert 0 < kept.bytes_held <= 1000
    again = validator({"const": 99, "$comment": "x" * 40}, kept=kept)
    assert validator({"const": 99, "$comment": "x" * 40}, kept=kept) is again
