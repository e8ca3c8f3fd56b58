"""The opposite of a schema as a list of schemas of which at least one must match, where that can be said exactly.

`rewrite` needs it for `not`, for `if`, and for `oneOf` whose branches overlap. It takes schemas in the reduced form of
`rewrite` and gives up (None) on what has no opposite in that form: patterns, items, additional members, multiples.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Final

from diptych.cluster.constraints import patterns
from diptych.cluster.constraints.disjoint import Library, type_of

MAX_ALTERNATIVES: Final = 48
MAX_DEPTH: Final = 6

_ALL: Final = ("null", "boolean", "number", "string", "array", "object")
_STEPS: Final = {
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}
_BOUNDS: Final = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}


def negated(schema: object, library: Library, depth: int = 0) -> list[object] | None:
    """Schemas that together match exactly what `schema` does not; empty where it matches everything."""
    known = library.look(schema)
    if isinstance(known, bool):
        # A reference whose meaning is not known yet looks like True.
        return None if isinstance(schema, dict) else [] if known else [True]
    if not isinstance(known, dict) or depth > MAX_DEPTH:
        return None
    found: list[object] = []
    for word, value in known.items():
        alternatives = _without(word, value, known, library, depth)
        if alternatives is None or len(found) + len(alternatives) > MAX_ALTERNATIVES:
            return None
        found += alternatives
    return found


def _without(word: str, value: object, schema: dict[str, object], library: Library, depth: int) -> list[object] | None:
    if word == "type":
        return _other_types([value] if isinstance(value, str) else list(_items(value)))
    if word in ("const", "enum"):
        return _other_values([value] if word == "const" else list(_items(value)))
    if word == "required":
        return [{"type": "object", "properties": {name: False}} for name in _items(value) if isinstance(name, str)]
    if word == "properties" and isinstance(value, dict):
        return _other_members(value, library, depth)
    if word in _STEPS and isinstance(value, int):
        kind, opposite, more = _STEPS[word]
        return [] if value + more < 0 else [{"type": kind, opposite: value + more}]
    if word in _BOUNDS:
        return [{"type": "number", _BOUNDS[word]: value}]
    if word == "allOf":
        return _joined([negated(part, library, depth + 1) for part in _items(value)])
    if word == "anyOf":
        return _crossed([negated(part, library, depth + 1) for part in _items(value)])
    if word == "additionalProperties" and value is True:
        return []
    return None


def _other_types(names: list[object]) -> list[object] | None:
    if "integer" in names and "number" not in names:
        return None
    rest = [name for name in _ALL if name not in names]
    return [{"type": rest}] if rest else []


def _other_values(values: list[object]) -> list[object] | None:
    kinds = {type_of(value) for value in values}
    if kinds & {"array", "object"}:
        return None
    rest = [name for name in _ALL if name not in kinds]
    found: list[object] = [{"type": rest}]
    if "string" in kinds:
        texts = [value for value in values if isinstance(value, str)]
        pattern = patterns.none_of(texts)
        if len(pattern) > patterns.MAX_PATTERN_CHARACTERS:
            return None
        found.append({"type": "string", "pattern": pattern})
    if "boolean" in kinds and len({value for value in values if isinstance(value, bool)}) == 1:
        found.append({"const": not next(value for value in values if isinstance(value, bool))})
    numbers = sorted({value for value in values if type_of(value) == "number" and isinstance(value, int | float)})
    if numbers:
        edges: list[float | None] = [None, *numbers, None]
        for low, high in pairwise(edges):
            between: dict[str, object] = {"type": "number"}
            if low is not None:
                between["exclusiveMinimum"] = low
            if high is not None:
                between["exclusiveMaximum"] = high
            found.append(between)
    return found


def _other_members(properties: dict[str, object], library: Library, depth: int) -> list[object] | None:
    found: list[object] = []
    for name, part in properties.items():
        opposite = negated(part, library, depth + 1)
        if opposite is None:
            return None
        for alternative in opposite:
            found.append({"type": "object", "properties": {name: alternative}, "required": [name]})
    return found


def _joined(groups: list[list[object] | None]) -> list[object] | None:
    found: list[object] = []
    for group in groups:
        if group is None:
            return None
        found += group
    return found


def _crossed(groups: list[list[object] | None]) -> list[object] | None:
    known: list[list[object]] = []
    count = 1
    for group in groups:
        if group is None:
            return None
        known.append(group)
        count *= len(group)
        if count > MAX_ALTERNATIVES:
            return None
    if any(group == [True] for group in known):
        known = [group for group in known if group != [True]]
    return [_all_of(chosen) for chosen in product(*known)]


def _all_of(parts: tuple[object, ...]) -> object:
    return {"allOf": list(parts)} if len(parts) > 1 else parts[0] if parts else True


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []
