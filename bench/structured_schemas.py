"""Fifty schemas of many kinds, each with what a client would ask for. structured_answers.py reads them.

Most bound their strings, as answers have 256 tokens; a few do not, so that truncated answers occur, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Schema = dict[str, Any]


def text(most: int = 24, least: int = 1, **more: Any) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most, **more}


def integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def many(items: Schema, most: int, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def closed(properties: Mapping[str, Any], *optional: str, **more: Any) -> Schema:
    """An object of these properties and no others."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
        **more,
    }


_ADDRESS: Final = closed({"street": text(), "number": integer(1, 999), "city": text(20)})
_POINT: Final = {
    "type": "array",
    "prefixItems": [{"type": "number", "minimum": -90, "maximum": 90}, {"type": "number"}],
    "items": False,
    "minItems": 2,
}

_OBJECTS: Final[dict[str, tuple[str, Schema]]] = {
    "person": ("Invent a person.", closed({"name": text(), "age": integer(0, 120), "is_student": {"type": "boolean"}})),
    "address": ("Invent a company and where it is.", closed({"company": text(), "address": _ADDRESS})),
    "deep": (
        "Describe a house with one room.",
        closed({"house": closed({"room": closed({"window": closed({"width_cm": integer(10, 400), "open": {}})})})}),
    ),
    "optionals": (
        "Describe a book; leave out what you do not know.",
        closed({"title": text(40), "isbn": text(13, 10), "pages": integer(1, 3000), "note": text(60)}, "isbn", "note"),
    ),
    "all_optional": (
        "Give display settings.",
        closed({"theme": {"enum": ["dark", "light"]}, "size": integer(8, 72), "bold": {"type": "boolean"}})
        | {"required": []},
    ),
    "open_object": ("Describe a cat.", {"type": "object", "properties": {"name": text()}, "required": ["name"]}),
    "any_object": ("Describe the weather in Oslo.", {"type": "object"}),
    "map_of_numbers": (
        "How many of each fruit are in the basket?",
        {"type": "object", "additionalProperties": integer(0, 50), "maxProperties": 5, "minProperties": 1},
    ),
    "map_by_pattern": (
        "Translate hello into some languages, by code.",
        {"type": "object", "patternProperties": {"^[a-z]{2}$": text(16)}, "additionalProperties": False},
    ),
    "map_of_objects": (
        "Which ports do our services use?",
        {"type": "object", "additionalProperties": closed({"port": integer(1, 65535)}), "maxProperties": 3},
    ),
    "unicode_keys": (
        "Stelle eine Person vor.",
        closed(
            {"gr\u00f6\u00dfe_cm": integer(40, 230), "\u540d\u524d": text(12), "\U0001f431 Katze": {"type": "boolean"}}
        ),
    ),
    "awkward_keys": (
        "Fill in the form.",
        closed(
            {'say "hi"': text(10), "back\\slash": {"type": "null"}, "a/b~c": {"type": "boolean"}, "": integer(1, 9)}
        ),
    ),
    "wide": (
        "Rate a restaurant from 1 to 5 in every respect.",
        closed({name: integer(1, 5) for name in ("food", "service", "price", "place", "noise", "speed", "menu")}),
    ),
}

_ARRAYS: Final[dict[str, tuple[str, Schema]]] = {
    "list_of_words": ("Name three animals.", many(text(16), 3, 3)),
    "list_of_enums": ("Which colours does a flag have?", many({"enum": ["red", "green", "blue", "white"]}, 6, 2)),
    "list_of_objects": (
        "Plan a meal with its ingredients.",
        closed({"dish": text(30), "ingredients": many(closed({"item": text(20), "grams": integer(1, 2000)}), 4, 1)}),
    ),
    "matrix": ("Give a small matrix of integers.", many(many(integer(-9, 9), 3, 3), 3, 2)),
    "tuple": (
        "Give the name and the age of a tree.",
        {"type": "array", "prefixItems": [text(), integer(0, 5000)], "items": False, "minItems": 2},
    ),
    "open_tuple": (
        "Give a command, and its arguments.",
        {"type": "array", "prefixItems": [{"enum": ["cp", "mv"]}], "items": text(12), "minItems": 3, "maxItems": 3},
    ),
    "draft7_tuple": (
        "Give a width, a height and a unit.",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [integer(1, 500), integer(1, 500), {"enum": ["cm", "in"]}],
            "additionalItems": False,
            "minItems": 3,
        },
    ),
    "points": ("Give the line from Rome to Oslo as points.", closed({"line": many(_POINT, 3, 2)})),
}

_VALUES: Final[dict[str, tuple[str, Schema]]] = {
    "enum": ("Is the review 'great soup' positive?", {"enum": ["positive", "negative", "neutral"]}),
    "mixed_enum": ("How many moons has Mars?", closed({"answer": {"enum": [1, 2, "two", None, True]}})),
    "const": ("Say that you agree.", closed({"kind": {"const": "consent"}, "agreed": {"const": True}, "by": text(12)})),
    "boolean": ("Is water wet?", {"type": "boolean"}),
    "integer_range": ("Roll two dice.", closed({"first": integer(1, 6), "second": integer(1, 6)})),
    "negative_range": ("How cold is it in Yakutsk?", closed({"celsius": integer(-71, -5)})),
    "number_range": ("Give a probability.", closed({"p": {"type": "number", "minimum": 0, "maximum": 1}})),
    "exclusive_range": (
        "Give a temperature above zero and below 0.5.",
        closed({"t": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}}),
    ),
    "multiple_of": ("Give a price in steps of 5.", closed({"price": {"type": "integer", "multipleOf": 5}})),
    "any_number": ("What is pi?", closed({"pi": {"type": "number"}})),
    "string_length": ("Give a code of four letters.", closed({"code": text(4, 4)})),
    "free_string": ("Summarise why the sky is blue.", closed({"summary": {"type": "string"}})),
    "pattern_code": ("Give a part number.", closed({"part": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}})),
    "pattern_middle": (
        "Give a word with two vowels in a row.",
        closed({"word": {"type": "string", "pattern": "[aeiou]{2}", "maxLength": 20}}),
    ),
    "date": ("When did the war end?", closed({"date": {"type": "string", "format": "date"}})),
    "moment": ("When does the train leave?", closed({"at": {"type": "string", "format": "date-time"}})),
    "email": ("Give a contact.", closed({"email": {"type": "string", "format": "email"}, "name": text(20)})),
    "machine": (
        "Describe a server.",
        closed({"id": {"type": "string", "format": "uuid"}, "ip": {"type": "string", "format": "ipv4"}}),
    ),
    "uri": ("Give the address of a page about bees.", closed({"url": {"type": "string", "format": "uri"}})),
    "nullable": ("What is the middle name of Ada?", closed({"middle": {"type": ["string", "null"], "maxLength": 12}})),
}

_CHOICES: Final[dict[str, tuple[str, Schema]]] = {
    "any_of": ("Give a size, in words or in cm.", closed({"size": {"anyOf": [text(10), integer(1, 300)]}})),
    "tagged_union": (
        "Invent a circle or a rectangle.",
        {
            "anyOf": [
                closed({"kind": {"const": "circle"}, "radius": integer(1, 99)}),
                closed({"kind": {"const": "rectangle"}, "width": integer(1, 99), "height": integer(1, 99)}),
            ]
        },
    ),
    "one_of": (
        "How will you pay?",
        closed(
            {
                "payment": {
                    "oneOf": [
                        closed({"card": {"type": "string", "pattern": "^[0-9]{16}$"}}),
                        closed({"iban": {"type": "string", "pattern": "^DE[0-9]{20}$"}}),
                        closed({"cash": {"const": True}}),
                    ]
                }
            }
        ),
    ),
    "all_of": (
        "Invent an employee.",
        {
            "allOf": [
                {"type": "object", "properties": {"name": text()}, "required": ["name"]},
                {"type": "object", "properties": {"salary": integer(1000, 9000)}, "required": ["salary"]},
            ],
            "unevaluatedProperties": False,
        },
    ),
    "definitions": (
        "Send a parcel.",
        closed(
            {"sender": {"$ref": "#/$defs/address"}, "to": {"$ref": "#/$defs/address"}},
            **{"$defs": {"address": _ADDRESS}},
        ),
    ),
    "recursion": (
        "Draw the family tree of Eve with one child.",
        {
            "$ref": "#/$defs/person",
            "$defs": {"person": closed({"name": text(10), "children": many({"$ref": "#/$defs/person"}, 2)})},
        },
    ),
    "expression": (
        "Write (1 + 2) * 3 as a tree.",
        {
            "$ref": "#/$defs/term",
            "$defs": {
                "term": {
                    "anyOf": [
                        integer(0, 99),
                        closed(
                            {"op": {"enum": ["+", "*"]}, "l": {"$ref": "#/$defs/term"}, "r": {"$ref": "#/$defs/term"}}
                        ),
                    ]
                }
            },
        },
    ),
}

# What no grammar says exactly: coverage is partial, and the check after the answer finds what fails.
_PARTIAL: Final[dict[str, tuple[str, Schema]]] = {
    "unique_items": ("Name some different colours.", closed({"colours": many(text(8), 4, 2) | {"uniqueItems": True}})),
    "lookahead": (
        "Invent a password of letters and digits.",
        closed({"password": {"type": "string", "pattern": "^(?=.*[0-9])[a-zA-Z0-9]{4,12}$"}}),
    ),
}

SCHEMAS: Final[dict[str, tuple[str, Schema]]] = _OBJECTS | _ARRAYS | _VALUES | _CHOICES | _PARTIAL
