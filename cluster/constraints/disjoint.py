"""Whether two schemas can be proved to have no value in common, so that `oneOf` may be read as `anyOf`.

`rewrite` asks it about schemas in its own reduced form. True is a proof; False says only that none was found: it knows
types, constants, required and forbidden members, and ranges, but not what patterns have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Final, Protocol

import jsonschema_rs

MAX_ALTERNATIVES: Final = 64
MAX_DEPTH: Final = 5
MAX_VALUES: Final = 256

_BASIC: Final = frozenset(["null", "boolean", "number", "string", "array", "object"])
_LOW: Final = {"minLength": "string", "minItems": "array", "minimum": "number", "minProperties": "object"}
_HIGH: Final = {"maxLength": "string", "maxItems": "array", "maximum": "number", "maxProperties": "object"}


class Library(Protocol):
    """What the schemas in hand refer to."""

    def look(self, schema: object) -> object:
        """The schema itself, or what its `$ref` means; True where that is not known yet."""

    def definitions(self) -> dict[str, object]:
        """All that a `$ref` may mean, by name."""


@dataclass(slots=True)
class _Facts:
    """What one alternative says, of values of each type."""

    types: frozenset[str] = _BASIC
    values: list[object] | None = None
    parts: list[dict[str, object]] = field(default_factory=list)

    def required(self) -> set[str]:
        return {name for part in self.parts for name in _names(part.get("required"))}

    def member(self, name: str) -> list[object]:
        """The schemas that a member of this name must match."""
        found: list[object] = []
        for part in self.parts:
            properties = part.get("properties")
            if isinstance(properties, dict) and name in properties:
                found.append(properties[name])
            elif "additionalProperties" in part and "patternProperties" not in part:
                found.append(part["additionalProperties"])
        return found

    def bound(self, words: dict[str, str], kind: str, *, highest: bool) -> float | None:
        found = [part[word] for part in self.parts for word, of in words.items() if of == kind and word in part]
        numbers = [float(n) for n in found if isinstance(n, int | float)]
        return None if not numbers else max(numbers) if highest else min(numbers)


def disjoint(first: list[object], second: list[object], library: Library) -> bool:
    """Whether no value matches all of `first` and all of `second`."""
    return _disjoint(first, second, library, 0)


def _disjoint(first: list[object], second: list[object], library: Library, depth: int) -> bool:
    if depth > MAX_DEPTH:
        return False
    left, right = _alternatives(first, library), _alternatives(second, library)
    if left is None or right is None or len(left) * len(right) > MAX_ALTERNATIVES:
        return False
    return all(_apart(f, g, library, depth) for f in left for g in right)


def _apart(first: _Facts, second: _Facts, library: Library, depth: int) -> bool:
    if first.values is not None and _refuted(first.values, second, library):
        return True
    if second.values is not None and _refuted(second.values, first, library):
        return True
    return all(_apart_at(kind, first, second, library, depth) for kind in first.types & second.types)


def _apart_at(kind: str, first: _Facts, second: _Facts, library: Library, depth: int) -> bool:
    for one, other in ((first, second), (second, first)):
        low, high = one.bound(_LOW, kind, highest=True), other.bound(_HIGH, kind, highest=False)
        if low is not None and high is not None and low > high:
            return True
    if kind == "object":
        return any(
            _disjoint(first.member(name), second.member(name), library, depth + 1)
            for name in sorted(first.required() | second.required())
        )
    if kind == "array":
        return all(_holds_something(facts) for facts in (first, second)) and _disjoint(
            list(_first_items(first)), list(_first_items(second)), library, depth + 1
        )
    return False


def _refuted(values: list[object], facts: _Facts, library: Library) -> bool:
    """Whether none of the values matches the facts."""
    left = [value for value in values if type_of(value) in facts.types]
    if not left:
        return True
    if len(left) > MAX_VALUES:
        return False
    schema = {"allOf": facts.parts, "$defs": library.definitions()}
    try:
        validator = jsonschema_rs.Draft202012Validator(schema, offline=True)
    except ValueError:
        return False
    return not any(validator.is_valid(value) for value in left)


def _alternatives(parts: list[object], library: Library) -> list[_Facts] | None:
    """The schemas taken together, as alternatives without `anyOf`; None where there are too many."""
    groups = []
    for part in parts:
        group = _expanded(part, library, 0)
        if group is None:
            return None
        groups.append(group)
    count = 1
    for group in groups:
        count *= len(group)
        if count > MAX_ALTERNATIVES:
            return None
    return [_facts([part for group in chosen for part in group]) for chosen in product(*groups)]


def _expanded(schema: object, library: Library, depth: int) -> list[list[dict[str, object]]] | None:
    schema = library.look(schema)
    if schema is False:
        return []
    if not isinstance(schema, dict):
        return [[]]
    if depth > MAX_DEPTH:
        return [[]]  # what is left out can only make a proof fail
    own = {word: value for word, value in schema.items() if word not in ("allOf", "anyOf")}
    whole: list[list[dict[str, object]]] = [[own]]
    for part in _list(schema.get("allOf")):
        group = _expanded(part, library, depth + 1)
        if group is None or len(whole) * len(group) > MAX_ALTERNATIVES:
            return None
        whole = [before + after for before in whole for after in group]
    if "anyOf" in schema:
        branches: list[list[dict[str, object]]] = []
        for part in _list(schema["anyOf"]):
            group = _expanded(part, library, depth + 1)
            if group is None:
                return None
            branches += group
        if len(whole) * len(branches) > MAX_ALTERNATIVES:
            return None
        whole = [before + after for before in whole for after in branches]
    return whole


def _facts(parts: Iterable[dict[str, object]]) -> _Facts:
    facts = _Facts()
    for part in parts:
        facts.parts.append(part)
        named = part.get("type")
        if named is not None:
            names = [named] if isinstance(named, str) else _names(named)
            facts.types &= frozenset("number" if name == "integer" else name for name in names)
        if "const" in part or "enum" in part:
            values = [part["const"]] if "const" in part else _list(part["enum"])
            facts.types &= frozenset(type_of(value) for value in values)
            if facts.values is None or len(values) < len(facts.values):
                facts.values = values
    return facts


def _holds_something(facts: _Facts) -> bool:
    low = facts.bound(_LOW, "array", highest=True)
    return low is not None and low >= 1


def _first_items(facts: _Facts) -> Iterator[object]:
    for part in facts.parts:
        prefix = _list(part.get("prefixItems"))
        if prefix:
            yield prefix[0]
        elif "items" in part:
            yield part["items"]


def type_of(value: object) -> str:
    """The name of a JSON value's type; whole numbers are numbers too."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _names(value: object) -> list[str]:
    return [name for name in _list(value) if isinstance(name, str)]
