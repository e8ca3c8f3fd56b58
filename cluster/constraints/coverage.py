"""What the grammar enforces of JSON Schema, keyword by keyword, found out by trying.

`python -m diptych.cluster.constraints.coverage` prints docs/structured-output-keywords.md. Each keyword has
small schemas with answers that match and answers that do not; the grammar and the check after are asked about each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from diptych.cluster.constraints import trial
from diptych.cluster.constraints.schema import judge
from diptych.cluster.constraints.validate import validator

_HEAD: Final = """# JSON Schema: what the grammar enforces

Written by `python -m diptych.cluster.constraints.coverage`, which tries each keyword. *Grammar*: **yes**, an answer
cannot break it; **mostly**, not in the usual shapes, and where it can, the request's coverage says `partial` and names
the place; **no**, named likewise. *Checked*: looked at once more in the finished answer.

| keyword | grammar | checked | note |
|---|---|---|---|"""

_TAIL: Final = """
Members of an object come in the order of `properties`; what `additionalProperties` and `patternProperties` allow
comes after them, with no check against equal names. Whitespace is one space at most after `:` and after `,`. Strings
are written without escapes by number, so control characters other than the named ones cannot occur. Where a number has
no bound, it may be larger than a 64-bit float.

Annotations (`title`, `description`, `default`, `examples`, `deprecated`, `readOnly`, `writeOnly`, `$comment`,
`content...`, `discriminator`, `externalDocs`, `xml`), words that begin with `x-` or `_`, formats that are not named
above, and words that JSON Schema does not know say nothing. A word that looks like a misspelled keyword is refused.
Drafts 4, 6, 7, 2019-09 and 2020-12 are told apart by `$schema`; 2020-12 is assumed. `$dynamicRef`, `$recursiveRef` and
a `$ref` to another document are refused.
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """A schema with answers, as JSON texts, that match it and that do not."""

    schema: dict[str, object]
    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    keyword: str
    probes: tuple[Probe, ...]
    note: str = ""


def _probe(schema: dict[str, object], good: str, bad: str) -> Probe:
    return Probe(schema, tuple(good.split(" ; ")), tuple(bad.split(" ; ")))


_S: Final[dict[str, object]] = {"type": "string"}
_I: Final[dict[str, object]] = {"type": "integer"}
_AB: Final[dict[str, object]] = {"a": _I, "b": _S}

ROWS: Final = (
    Row("type", (_probe({"type": ["string", "null"]}, '"x" ; null', "1 ; {}"), _probe(_I, "-3", "1.5 ; true"))),
    Row("enum", (_probe({"enum": ["a", 1, None, {"x": [1]}]}, '"a" ; 1 ; null ; {"x":[1]}', '"b" ; 2'),)),
    Row("const", (_probe({"const": "a"}, '"a"', '"b" ; 1'),)),
    Row("minLength", (_probe(_S | {"minLength": 2}, '"ab"', '"a"'),)),
    Row("maxLength", (_probe(_S | {"maxLength": 2}, '"ab"', '"abc"'),)),
    Row(
        "pattern",
        (_probe(_S | {"pattern": "^a+b$"}, '"aab"', '"ba"'), _probe(_S | {"pattern": "^(?!x)"}, '"a"', '"xa"')),
        "not with lookarounds, back-references, `\\b`; nor where more than six must match one string",
    ),
    *(
        Row(f"format: {name}", (_probe(_S | {"format": name}, good, bad),), note)
        for name, good, bad, note in (
            ("date", '"2024-02-29"', '"2023-02-29" ; "2024-13-01"', ""),
            ("time", '"23:59:60Z" ; "12:00:00+01:00"', '"25:00:00Z" ; "12:00:60Z"', ""),
            ("date-time", '"2024-02-29T12:00:00Z"', '"2024-02-30T12:00:00Z"', ""),
            ("duration", '"P1DT2H"', '"P" ; "1D"', ""),
            ("email", '"a.b@example.org"', '"a" ; "@b"', "no quoted local parts, no addresses in brackets"),
            ("hostname", '"example.org"', '"-a" ; "a..b"', ""),
            ("ipv4", '"192.168.0.1"', '"256.0.0.1"', ""),
            ("ipv6", '"::1"', '"::g"', ""),
            ("uri", '"https://example.org/a?b#c"', '"a b" ; "x"', "no addresses in brackets"),
            ("uri-reference", '"/a/b?c"', '"a b"', "no addresses in brackets"),
            ("uuid", '"123e4567-e89b-12d3-a456-426614174000"', '"123e4567"', ""),
            ("json-pointer", '"/a/~0b"', '"a" ; "/~2"', ""),
            ("relative-json-pointer", '"1/a"', '"/a"', ""),
            ("regex", '"a+"', '"("', ""),
            ("iri", '"https://example.org"', '"x y"', "likewise iri-reference, idn-email, idn-hostname, uri-template"),
        )
    ),
    Row("minimum", (_probe({"type": "number", "minimum": 1.5}, "1.5 ; 2", "1.4 ; -2"),)),
    Row("maximum", (_probe({"type": "number", "maximum": 1.5}, "1.5 ; -2", "1.6 ; 20"),)),
    Row("exclusiveMinimum", (_probe(_I | {"exclusiveMinimum": 1}, "2", "1 ; 0"),), "in draft 4 true and false"),
    Row("exclusiveMaximum", (_probe(_I | {"exclusiveMaximum": 1}, "0", "1 ; 2"),), "in draft 4 true and false"),
    Row(
        "multipleOf",
        (_probe(_I | {"multipleOf": 3}, "9", "10"), _probe({"type": "number", "multipleOf": 0.01}, "1.25", "1.255")),
    ),
    Row("items", (_probe({"type": "array", "items": _I}, "[] ; [1,2]", '["a"] ; [1,"a"]'),)),
    Row(
        "prefixItems",
        (_probe({"type": "array", "prefixItems": [_I, _S], "items": False}, '[1,"a"] ; [1]', '["a"] ; [1,"a",2]'),),
        "before 2020-12 a list in `items`, with `additionalItems`",
    ),
    Row("minItems", (_probe({"type": "array", "minItems": 2}, "[1,2]", "[1]"),)),
    Row("maxItems", (_probe({"type": "array", "maxItems": 1}, "[1]", "[1,2]"),)),
    Row("uniqueItems", (_probe({"type": "array", "uniqueItems": True}, "[1,2]", "[1,1]"),)),
    Row(
        "contains",
        (
            _probe({"type": "array", "contains": _I}, '["a",1]', "[]"),
            _probe({"type": "array", "contains": _I}, "[1]", '["a"]'),
        ),
        "that there are enough items; `minContains` and `maxContains` are checked",
    ),
    Row("properties", (_probe({"type": "object", "properties": _AB}, '{"a":1,"b":"x"} ; {}', '{"a":"x"}'),)),
    Row("required", (_probe({"type": "object", "properties": _AB, "required": ["b"]}, '{"b":"x"}', '{"a":1} ; {}'),)),
    Row(
        "additionalProperties",
        (
            _probe({"type": "object", "properties": _AB, "additionalProperties": False}, '{"a":1}', '{"c":1}'),
            _probe({"type": "object", "additionalProperties": _I}, '{"c":1}', '{"c":"x"}'),
        ),
    ),
    Row(
        "patternProperties",
        (
            _probe({"type": "object", "patternProperties": {"^n_": _I}}, '{"n_a":1,"b":"x"}', '{"n_a":"x"}'),
            _probe({"patternProperties": {"a": _I, "b": {"minimum": 3}}}, '{"ab":4}', '{"ab":1}'),
        ),
        "where one name can match two patterns, one of the two rules",
    ),
    Row(
        "propertyNames",
        (
            _probe({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, '{"ab":1}', '{"A":1}'),
            _probe({"type": "object", "propertyNames": {"enum": ["a", "b"]}}, '{"a":1}', '{"c":1}'),
            _probe({"propertyNames": {"minLength": 2, "pattern": "^a"}}, '{"ab":1}', '{"b":1}'),
        ),
        "a pattern, a list or lengths, not together",
    ),
    Row(
        "minProperties",
        (
            _probe({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
            _probe({"type": "object", "properties": _AB, "minProperties": 2}, '{"a":1,"b":"x"}', '{"a":1}'),
        ),
        "1, or where all named members are required, or few are optional and no others allowed",
    ),
    Row(
        "maxProperties",
        (
            _probe({"type": "object", "maxProperties": 1}, '{"a":1}', '{"a":1,"b":2}'),
            _probe({"type": "object", "properties": _AB, "maxProperties": 1}, '{"a":1}', '{"a":1,"b":"x"}'),
        ),
        "where all named members are required, or few are optional and no others allowed",
    ),
    Row(
        "dependentRequired",
        (
            _probe(
                {"type": "object", "properties": _AB, "dependentRequired": {"a": ["b"]}},
                '{"a":1,"b":"x"} ; {}',
                '{"a":1}',
            ),
        ),
        "`dependencies` likewise",
    ),
    Row(
        "dependentSchemas",
        (
            _probe(
                {"properties": _AB, "dependentSchemas": {"a": {"properties": {"b": {"const": "x"}}}}},
                '{"a":1,"b":"x"} ; {"b":"y"}',
                '{"a":1,"b":"y"}',
            ),
        ),
    ),
    Row("allOf", (_probe({"allOf": [_I, {"minimum": 3}]}, "3", '2 ; "x"'),)),
    Row("anyOf", (_probe({"anyOf": [_I, _S]}, '3 ; "x"', "true"),)),
    Row(
        "oneOf",
        (
            _probe({"oneOf": [_I, _S]}, '3 ; "x"', "true"),
            _probe(
                {"properties": _AB, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
                '{"a":1}',
                '{"a":1,"b":"x"} ; {}',
            ),
            _probe({"oneOf": [_S | {"pattern": "^a"}, _S | {"pattern": "b$"}]}, '"a"', '"ab"'),
        ),
        "where branches exclude each other (types, constants, required members, ranges), or can be made to",
    ),
    Row(
        "not",
        (
            _probe({"not": _S}, "1", '"x"'),
            _probe({"type": "string", "not": {"enum": ["a", "ab"]}}, '"b" ; "abc"', '"a" ; "ab"'),
            _probe({"type": "string", "not": {"pattern": "^a"}}, '"b"', '"a"'),
        ),
        "types, constants, bounds, required members and what is made of them; not patterns, items",
    ),
    Row(
        "if, then, else",
        (
            _probe(
                {
                    "type": "object",
                    "properties": {"kind": {"enum": ["a", "b"]}, "n": _I},
                    "required": ["kind"],
                    "if": {"properties": {"kind": {"const": "a"}}},
                    "then": {"required": ["n"]},
                    "else": {"properties": {"n": False}},
                },
                '{"kind":"a","n":1} ; {"kind":"b"}',
                '{"kind":"a"} ; {"kind":"b","n":1}',
            ),
            _probe({"if": {"pattern": "^a"}, "then": {"maxLength": 2}}, '"ab"', '"abc"'),
        ),
        "where `not` is possible for the condition",
    ),
    Row(
        "$ref, $defs",
        (
            _probe(
                {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "type": "object"}}},
                '{"n":{}}',
                '{"n":1}',
            ),
        ),
        "`$anchor`, `$id`, `definitions` too; within the document",
    ),
    Row(
        "unevaluatedProperties",
        (
            _probe({"type": "object", "properties": _AB, "unevaluatedProperties": False}, '{"a":1}', '{"c":1}'),
            _probe({"allOf": [{"properties": _AB}], "unevaluatedProperties": False}, '{"a":1}', '{"c":1}'),
        ),
        "without allOf, anyOf, oneOf, if, not, `$ref` beside it",
    ),
    Row(
        "unevaluatedItems",
        (
            _probe({"type": "array", "prefixItems": [_I], "unevaluatedItems": False}, "[1]", "[1,2]"),
            _probe({"allOf": [{"prefixItems": [_I]}], "unevaluatedItems": False}, "[1]", "[1,2]"),
        ),
        "likewise, and without contains",
    ),
)


def page() -> str:
    """The page. Raises AssertionError where a probe shows what the table's words would hide."""
    return "\n".join([_HEAD, *(_line(row) for row in ROWS), _TAIL])


def _line(row: Row) -> str:
    outcomes = [_enforced(probe, row.keyword) for probe in row.probes]
    grammar = "yes" if all(outcomes) else "mostly" if any(outcomes) else "no"
    keyword = ": ".join(f"`{part}`" if i == 0 else part for i, part in enumerate(row.keyword.split(": ")))
    return f"| {keyword} | {grammar} | {_checked(row)} | {row.note} |"


def _enforced(probe: Probe, keyword: str) -> bool:
    judged = judge(probe.schema)
    assert judged.backend == "llguidance", keyword
    grammar = trial.json_grammar(judged.schema)
    for answer in probe.good:
        assert trial.accepts(grammar, answer), f"{keyword}: the grammar refuses {answer}"
    enforced = not any(trial.accepts(grammar, answer) for answer in probe.bad)
    assert enforced or judged.coverage == "partial", f"{keyword}: not enforced and not named"
    return enforced


def _checked(row: Row) -> str:
    for probe in row.probes:
        check = validator(probe.schema)
        assert not any(check.errors(answer) for answer in probe.good), row.keyword
        if not all(check.errors(answer) for answer in probe.bad):
            return "no"
    return "yes"


if __name__ == "__main__":
    print(page())
