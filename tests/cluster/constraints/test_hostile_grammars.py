"""Bombs: each ends in a refusal or a grammar within two seconds, and caches stay bounded."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from diptych.cluster.constraints import lark
from diptych.cluster.constraints.schema import Verdicts, judge
from diptych.protos.errors import InvalidRequest

MAX_CPU_S = 2.0


def chained(last: object, link: Callable[[str], object]) -> dict[str, object]:
    defs = {f"d{i}": link(f"#/$defs/d{i + 1}") for i in range(30)}
    return {"$defs": {**defs, "d30": last}, "$ref": "#/$defs/d0"}


def deep(levels: int) -> object:
    schema: object = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema, {"type": "array", "items": {"type": "integer"}}]}
    return schema


SCHEMAS: dict[str, object] = {
    "counted pattern": {"pattern": "(a{1,1000}){1,1000}"},
    "wide pattern": {"pattern": "(.{0,500}x){0,30}y"},
    "nested quantifiers": {"pattern": "((a*)*)*((b+)+)+c"},
    "parentheses": {"pattern": "(" * 4000 + "a" + ")" * 4000},
    "patterns that meet": {"allOf": [{"pattern": f"[a-z]{{0,{i}}}x[0-9]*"} for i in range(60)]},
    "patterns that meet in members": {"allOf": [{"properties": {"k": {"pattern": f".*{i}.*x"}}} for i in range(40)]},
    "reference to itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "not itself": {"not": {"$ref": "#"}},
    "one of itself": {"oneOf": [{"$ref": "#"}, {"type": "string"}]},
    "all of itself": {"allOf": [{"$ref": "#"}]},
    "trees": {"properties": {"x": {"$ref": "#"}, "y": {"$ref": "#"}}},
    "a large enum": {"enum": [f"v{i}" for i in range(100_000)]},
    "not a large enum": {"not": {"enum": [f"value{i}" for i in range(4000)]}},
    "minItems": {"type": "array", "minItems": 10**9},
    "many items": {"type": "array", "minItems": 10**5},
    "deep anyOf": deep(40),
    "doubling references": chained({"type": "object"}, lambda r: {"allOf": [{"$ref": r}, {"$ref": r}]}),
    "doubling negations": chained({"type": "string"}, lambda r: {"not": {"allOf": [{"$ref": r}, {"$ref": r}]}}),
    "doubling oneOf": chained({"type": "string"}, lambda r: {"oneOf": [{"$ref": r}, {"items": {"$ref": r}}]}),
    "allOf of anyOf": {
        "allOf": [{"anyOf": [{"properties": {f"k{i}": {"const": j}}} for j in range(6)]} for i in range(12)]
    },
    "oneOf of many": {"oneOf": [{"required": [f"k{i}"]} for i in range(80)]},
    "oneOf of oneOf": {"oneOf": [{"oneOf": [{"required": [f"{i}-{j}"]} for j in range(10)]} for i in range(10)]},
    "many members": {"properties": {f"p{i}": {"type": "integer"} for i in range(1500)}},
    "counted members": {"properties": {f"p{i}": {} for i in range(40)}, "minProperties": 7},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941, 9931)]},
}
PATTERNS = {
    "counted": "(a{1,1000}){1,1000}",
    "parentheses": "(" * 30_000 + "a" + ")" * 30_000,
    "alternatives": "|".join(f"word{i}[a-z]*{i}" for i in range(3400)),
    "gaps": ".*".join("abcdefghij" * 20),
    "quantified groups": "(" * 150 + "a" + ")*" * 150,
    "lookahead": "(?=a)b",
}
GRAMMARS = {
    "left recursion": 'start: start "a" | "a"',
    "hidden left recursion": 'start: a\na: b "x" | a "y" |\nb: a',
    "parentheses": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "a tower of rules": "start: r0\n"
    + "\n".join(f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(2000))
    + '\nr2000: "b"',
    "repetitions": 'start: (("a"{1,1000}){1,1000}){1,1000}',
    "ambiguity": 'start: a a a a a a a a\na: a a | "x" |',
    "GBNF": "root ::= " + "(" * 150 + '"a"' + ")" * 150,
    "GBNF repetition": 'root ::= "a"{1,100000}',
    "circle of terminals": 'start: A\nA: A "x"',
}
BOMBS: dict[str, Callable[[], object]] = {
    **{f"schema: {name}": partial(judge, schema, "s") for name, schema in SCHEMAS.items()},
    **{f"regex: {name}": partial(lark.checked_regex, text, "r") for name, text in PATTERNS.items()},
    **{f"grammar: {name}": partial(lark.checked, text, "g") for name, text in GRAMMARS.items()},
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_or_compiled_in_time(bomb: Callable[[], object]) -> None:
    """60 patterns on one string kept the router's core for longer than anybody waited."""
    started = time.process_time()
    error = refused(bomb)
    assert time.process_time() - started < 4 * MAX_CPU_S
    if error is not None:
        assert (error.param or "")[:1] in ("r", "g", "s")
        assert len(str(error)) < 600


def refused(bomb: Callable[[], object]) -> InvalidRequest | None:
    try:
        bomb()
    except InvalidRequest as error:
        return error
    return None


def test_verdicts_kept_are_bounded() -> None:
    """10,000 unique schemas: the newest are kept, within the bound of number and of bytes."""
    verdicts = Verdicts(max_count=64, max_bytes=20_000)
    for number in range(300):
        judge({"const": f"{number}" * (1 + number % 50)}, "s", verdicts)
    assert 0 < len(verdicts) <= 64
    assert 0 < verdicts.bytes_held <= 20_000
    assert judge({"const": "299" * 50}, "s", verdicts) is judge({"const": "299" * 50}, "s", verdicts)
