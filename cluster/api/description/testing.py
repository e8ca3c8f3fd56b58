"""Values at and around the bounds of what is declared: tests send them and look whether readers agree.

Whether a value is one that the declaration allows is told by a JSON schema validator, not by who made it.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs

from .document import shapes
from .shapes import REF, Field, JsonObject, Shape

MAX_LISTED = 5000  # entries of a list, characters of a text that is made
MAX_TEXT = 300_000
LETTERS = string.ascii_lowercase
# Values of every kind: each is wrong for most fields.
JUNK: tuple[object, ...] = (None, True, False, 0, -1, 7, 1.5, 10**20, "", "junk", "5", [], [None], {}, {"junk": 1})


def validator(schema: JsonObject) -> jsonschema_rs.Validator:
    """Of a schema in the words of this description."""
    return jsonschema_rs.validator_for({**schema, "components": {"schemas": _components(schema)}})


def _components(schema: JsonObject) -> JsonObject:
    found: JsonObject = {}
    left = _names(schema)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = shapes()[name].schema()
            left |= _names(found[name])
    return found


def _names(value: object) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"].removeprefix(REF)} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(_names(inner) for inner in value.values()))
    return set().union(*(_names(inner) for inner in value)) if isinstance(value, list) else set()


@dataclass(frozen=True, slots=True)
class Place:
    """Where objects of a shape stand in a body: `body` is a whole one, and `path` leads to the object in it."""

    shape: Shape
    body: JsonObject
    path: tuple[str | int, ...]

    def holding(self, value: JsonObject) -> JsonObject:
        """The body with `value` in the place."""
        made: JsonObject = _with(self.body, self.path, value)
        return made

    @property
    def present(self) -> JsonObject:
        """The object that stands there."""
        found: Any = self.body
        for part in self.path:
            found = found[part]
        return dict(found)


def _with(body: Any, path: tuple[str | int, ...], value: object) -> Any:
    if not path:
        return value
    first, *rest = path
    inner = _with(body[first], tuple(rest), value)
    if isinstance(body, list):
        return [inner if at == first else entry for at, entry in enumerate(body)]
    return {**body, first: inner}


@dataclass(frozen=True, slots=True)
class Samples:
    """Makes values and bodies.

    given    what a field has, by the names of shape and field or by the field's, before anything else is thought of
    besides  what a field needs beside it, by both names; or what a shape has besides its required fields
    staged   for a shape that cannot stand alone: fields of the body, and the way to its place
    """

    given: Mapping[str, object] = field(default_factory=dict)
    besides: Mapping[str, JsonObject] = field(default_factory=dict)
    staged: Mapping[str, tuple[JsonObject, tuple[str | int, ...]]] = field(default_factory=dict)

    def least(self, shape: Shape) -> JsonObject:
        """An object of the shape with the fewest fields."""
        named = {one.name: self.value(shape, one) for one in shape.fields if one.is_required}
        return named | dict(self.besides.get(shape.name, {}))

    def value(self, shape: Shape, one: Field) -> object:
        """A value that the field takes, if possible not null."""
        for name in (f"{shape.name}.{one.name}", one.name):
            if name in self.given:
                return self.given[name]
        return self._first(one.schema)

    def _first(self, schema: JsonObject) -> object:
        judge = validator(schema)
        allowed = [value for value in [*self.around(schema), *JUNK] if judge.is_valid(value)]
        assert allowed, f"nothing that {schema} allows was thought of"
        return next((value for value in allowed if value not in (None, [], {}, "")), allowed[0])

    def around(self, schema: JsonObject) -> Iterator[object]:
        """Values within, at and beyond the schema's bounds."""
        yield from schema.get("examples", ())
        yield from schema.get("enum", ())
        if "$ref" in schema:
            yield from self._objects(shapes()[schema["$ref"].removeprefix(REF)])
        for branch in schema.get("anyOf", ()):
            yield from self.around(branch)
        kinds = schema.get("type", ())
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            match kind:
                case "boolean":
                    yield from (True, False)
                case "string":
                    yield from _texts(schema)
                case "integer" | "number":
                    yield from _numbers(schema)
                case "array":
                    yield from self._lists(schema)
                case "object" if isinstance(schema.get("additionalProperties"), dict):
                    yield from self._mappings(schema)
                case "object":
                    yield {"type": "object"}

    def _objects(self, shape: Shape) -> Iterator[JsonObject]:
        if shape.one_of:
            for inner in shape.one_of:
                yield from self._objects(inner)
            return
        least = self.least(shape)
        yield least
        for name in shape.required:
            yield {key: value for key, value in least.items() if key != name}
        if not shape.is_open:
            yield {**least, "junk": 1}

    def _lists(self, schema: JsonObject) -> Iterator[list[object]]:
        item = self._first(schema["items"])
        most = schema.get("maxItems")
        sizes = {schema.get("minItems", 0), 1} | ({most, most + 1} if most is not None else set())
        for size in sorted(sizes):
            if size <= MAX_LISTED:
                yield [item] * size
        yield from ([value] for value in self.around(schema["items"]))

    def _mappings(self, schema: JsonObject) -> Iterator[JsonObject]:
        values, names = schema["additionalProperties"], schema.get("propertyNames", {})
        item, most = (self._first(values) if values else 1), schema.get("maxProperties")
        plain = str.isdigit if "[0-9]" in names.get("pattern", "") else None
        many = [
            str(at) if plain else f"{'abcdefghijklmnopqrstuvwxyz'[at % 26]}{'_' * (at // 26)}" for at in range(1100)
        ]
        yield {}
        yield {many[0]: item}
        yield {"not a name!": item}
        if "maxLength" in names:
            yield {"x" * names["maxLength"]: item}
            yield {"x" * (names["maxLength"] + 1): item}
        if most is not None and most < len(many):
            yield dict.fromkeys(many[:most], item)
            yield dict.fromkeys(many[: most + 1], item)
        yield from ({many[0]: value} for value in (self.around(values) if values else ()))

    def places(self, body: Shape) -> list[Place]:
        """Where every object stands that a body can hold, the body first; each shape at the first of its places."""
        found = [Place(shape, self.least(shape), ()) for shape in body.alternatives()]
        seen = {place.shape.name for place in found}
        known = shapes()
        for place in found:  # grows
            for one in place.shape.fields:
                around = self.besides.get(f"{place.shape.name}.{one.name}", {})
                for name, path, holder in _refs(one.schema):
                    if name in seen:
                        continue
                    seen.add(name)
                    shape = known[name]
                    if name in self.staged:
                        fields, way = self.staged[name]
                        roots = [root for root in found if not root.path]
                        root = next((root for root in roots if fields.keys() <= {*root.shape.required}), roots[0])
                        found.append(Place(shape, root.body | fields, way))
                        continue
                    held = {**place.present, **around, one.name: holder(self.least(shape))}
                    found.append(Place(shape, place.holding(held), (*place.path, one.name, *path)))
        return found


def _refs(schema: JsonObject) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    """The objects that may stand in a field: name of the shape, the way to it, and what holds it."""
    if "$ref" in schema:
        yield schema["$ref"].removeprefix(REF), (), lambda value: value
    for branch in schema.get("anyOf", ()):
        yield from _refs(branch)
    kinds = schema.get("type", ())
    if "array" in ([kinds] if isinstance(kinds, str) else kinds):
        for name, path, holder in _refs(schema["items"]):
            yield name, (0, *path), lambda value, holder=holder: [holder(value)]


def _texts(schema: JsonObject) -> Iterator[str]:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    yield "a" * max(least, 1)
    if least:
        yield "a" * (least - 1)
    if "pattern" in schema:
        yield "-- \n?"
    if most is not None and most <= MAX_TEXT:
        yield "a" * most
        yield "a" * (most + 1)


def _numbers(schema: JsonObject) -> Iterator[object]:
    step = 1 if schema["type"] == "integer" or "integer" in schema["type"] else 0.001
    for name, sign in (("minimum", -1), ("maximum", 1)):
        if (bound := schema.get(name)) is not None:
            yield from (bound, bound + sign * step)
    for name, sign in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
        if (bound := schema.get(name)) is not None:
            yield from (bound + sign * step, bound)
    yield 1
