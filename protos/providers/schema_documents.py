"""A JSON schema as one document: its references followed, what several schemas say of one value said by one.

Called by schemas.py and schema_values.py. Knows JSON Schema (2020-12 and what draft 7 wrote otherwise), and no vendor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from diptych.protos.strict_json import printable
from diptych.protos.wire_checks import JsonObject, compact

MAX_DEPTH = 64
MAX_BRANCHES = 64  # of one anyOf, after two were multiplied
# Of these nothing follows for a value.
ANNOTATIONS = frozenset({"description", "title", "default", "examples", "example"})
MEANINGLESS = frozenset(
    "$schema $id $comment $anchor $vocabulary $defs definitions id deprecated readOnly writeOnly discriminator xml "
    "externalDocs".split()
)
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
# By which keywords a schema that names no type means one.
_TELLING: dict[str, tuple[str, ...]] = {
    "object": ("properties", "additionalProperties", "required", "patternProperties", "minProperties", "propertyNames"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("minLength", "maxLength", "pattern", "format", "contentEncoding"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_HIGHER = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
_LOWER = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"})


_LISTS = ("anyOf", "allOf", "oneOf")
_NUMBERS = _HIGHER | _LOWER | {"multipleOf"}


class Inexpressible(ValueError):
    """A schema, or a dialect's form of one, that there is not. `path` is the place in the schema."""

    def __init__(self, path: str, words: str) -> None:
        super().__init__(path, words)
        self.path = path
        self.words = words

    def __str__(self) -> str:
        return f"{self.path or 'the schema'} {self.words}"


class Document:
    """A schema with what its references point to."""

    def __init__(self, root: JsonObject) -> None:
        self.root = root
        self._cyclic: dict[str, bool] = {}

    def resolve(self, pointer: str, path: str) -> object:
        """What `pointer`, a reference within the document, points to. Raises Inexpressible."""
        if pointer != "#" and not pointer.startswith("#/"):
            told = printable(pointer, 80)
            raise Inexpressible(path, f"refers to {told}, which is not in this schema: put it into $defs")
        at: Any = self.root
        for token in pointer.split("/")[1:]:
            name = unquote(token).replace("~1", "/").replace("~0", "~")
            if isinstance(at, list) and name.isdecimal() and int(name) < len(at):
                at = at[int(name)]
            elif isinstance(at, dict) and name in at:
                at = at[name]
            else:
                raise Inexpressible(path, f"refers to {printable(pointer, 80)}, which there is not")
        return at

    def is_cyclic(self, pointer: str) -> bool:
        """Whether what it points to leads back to it."""
        if pointer not in self._cyclic:
            seen: set[str] = set()
            left = [pointer]
            while left:
                for found in self._references(left.pop()):
                    if found not in seen:
                        seen.add(found)
                        left.append(found)
            self._cyclic[pointer] = pointer in seen
        return self._cyclic[pointer]

    def _references(self, pointer: str) -> Iterator[str]:
        try:
            left = [self.resolve(pointer, "")]
        except Inexpressible:
            return  # of something that only looks like a reference, or is refused when it is followed
        while left:
            at = left.pop()
            if isinstance(at, dict):
                if isinstance(reference := at.get("$ref"), str):
                    yield reference
                left.extend(at.values())
            elif isinstance(at, list):
                left.extend(at)

    def flat(self, schema: object, path: str, *, keeps: bool, follows: bool = False, depth: int = 0) -> JsonObject:
        """`schema` without `allOf`, `oneOf` and `nullable`, and its reference followed: all but those that stand alone
        where the caller `keeps` such, which come as {"$ref": ...}. Who `follows` them one by one, as a value has them,
        comes to an end with recursive ones, too; nobody else may. Raises Inexpressible.
        """
        if schema is False:
            raise Inexpressible(path, "allows no value at all")
        if schema is not True and not isinstance(schema, dict):
            raise Inexpressible(path, "is no schema: an object is one, or true")
        if depth > MAX_DEPTH:
            raise Inexpressible(path, f"leads through more than {MAX_DEPTH} references or allOf")
        flat: JsonObject = {} if schema is True else {k: v for k, v in schema.items() if k not in MEANINGLESS}
        _check(flat, path)
        if isinstance(reference := flat.pop("$ref", None), str):
            if keeps and not flat:
                return {"$ref": reference}
            if keeps and self.is_cyclic(reference) and flat.keys() <= ANNOTATIONS:
                return {"$ref": reference}
            if not follows and self.is_cyclic(reference):
                raise Inexpressible(path, "refers to itself by and by: such a recursion cannot be said here")
            target = self.flat(self.resolve(reference, path), path, keeps=False, follows=follows, depth=depth + 1)
            flat = merged(flat, target, path)
        for part in flat.pop("allOf", ()):
            flat = merged(flat, self.flat(part, path, keeps=False, follows=follows, depth=depth + 1), path)
        if "oneOf" in flat:
            flat = merged(flat, {"anyOf": flat.pop("oneOf")}, path)
        return _with_null(flat)


def _check(flat: JsonObject, path: str) -> None:
    """The form of what is read here. Raises Inexpressible."""
    for key, value in flat.items():
        match key:
            case "type":
                kinds = value if isinstance(value, list) else [value]
                is_right = bool(kinds) and all(isinstance(kind, str) and kind in TYPES for kind in kinds)
                words = f"must be one of {', '.join(TYPES)}, or a list of them"
            case "properties" | "patternProperties":
                is_right, words = isinstance(value, dict), "must be an object from names to schemas"
            case "required":
                is_right = isinstance(value, list) and all(isinstance(name, str) for name in value)
                words = "must be a list of names"
            case "enum":
                is_right, words = isinstance(value, list), "must be a list of values"
            case "prefixItems":
                is_right, words = isinstance(value, list), "must be a list of schemas"
            case _ if key in _LISTS:
                is_right, words = isinstance(value, list) and bool(value), "must be a list of schemas"
            case _ if key in _NUMBERS:
                is_right, words = _are_numbers(value), "must be a number"
            case "format" | "pattern" | "description" | "title":
                is_right, words = isinstance(value, str), "must be a string"
            case _:
                continue
        if not is_right:
            raise Inexpressible(f"{path}.{key}", words)


def _with_null(flat: JsonObject) -> JsonObject:
    """OpenAPI's `nullable` in JSON Schema's words."""
    if flat.pop("nullable", None) is not True:
        return flat
    if "anyOf" in flat:
        return {**flat, "anyOf": [*flat["anyOf"], {"type": "null"}]}
    types = types_of(flat)
    if types and "null" not in types:
        flat["type"] = [*types, "null"]
        if "enum" in flat and None not in flat["enum"]:
            flat["enum"] = [*flat["enum"], None]
    return flat


def merged(one: JsonObject, other: JsonObject, path: str) -> JsonObject:
    """What allows the values that both allow. Raises Inexpressible where there is no such schema in plain words."""
    one, other = _closed(one, other, path), _closed(other, one, path)
    both = dict(one)
    for key, value in other.items():
        if key not in both:
            both[key] = value
        elif key not in ANNOTATIONS and both[key] != value:
            both[key] = _of_both(key, both[key], value, path)
    return both


def _of_both(key: str, one: Any, other: Any, path: str) -> object:
    """The value of a keyword that stands for what both of its values say."""
    if key in _HIGHER | _LOWER and _are_numbers(one, other):
        return max(one, other) if key in _HIGHER else min(one, other)
    match key, one, other:
        case "type", _, _:
            return _types(one, other, path)
        case "properties", dict(), dict():
            shared = {name: {"allOf": [one[name], other[name]]} for name in other if name in one}
            return one | other | {name: one[name] if one[name] == other[name] else shared[name] for name in shared}
        case "required", list(), list():
            return [*one, *(name for name in other if name not in one)]
        case "enum", list(), list():
            known = {compact(value) for value in other}
            return [value for value in one if compact(value) in known]
        case "anyOf", list(), list():
            if len(one) * len(other) > MAX_BRANCHES:
                raise Inexpressible(path, f"has more than {MAX_BRANCHES} alternatives")
            return [{"allOf": [a, b]} for a in one for b in other]
        case "items" | "additionalProperties", dict() | bool(), dict() | bool():
            return False if one is False or other is False else {"allOf": [one, other]}
        case "uniqueItems", _, _:
            return True
    raise Inexpressible(path, f"has two different {printable(key, 40)} that both hold")


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _closed(open_one: JsonObject, other: JsonObject, path: str) -> JsonObject:
    """`open_one` without the properties that `other`, which takes none but its own, refuses."""
    if other.get("additionalProperties") is not False or not open_one.get("properties"):
        return open_one
    known = other.get("properties", {})
    if wrong := [name for name in open_one.get("required", ()) if name not in known]:
        raise Inexpressible(path, f"requires {printable(str(wrong[0]), 40)} and forbids it by additionalProperties")
    return {**open_one, "properties": {k: v for k, v in open_one["properties"].items() if k in known}}


def _types(one: Any, other: Any, path: str) -> object:
    mine = one if isinstance(one, list) else [one]
    theirs = other if isinstance(other, list) else [other]
    kept = [kind for kind in mine if kind in theirs or (kind == "integer" and "number" in theirs)]
    kept += [kind for kind in theirs if kind == "integer" and "number" in mine and kind not in kept]
    if not kept:
        raise Inexpressible(path, f"must be of type {compact(one)} and of type {compact(other)}: no value is")
    return kept[0] if len(kept) == 1 else kept


def types_of(flat: JsonObject) -> list[str]:
    """The types of the values that a flat schema without `anyOf` allows, as far as it tells; empty: it does not."""
    given = flat.get("type")
    found = [given] if isinstance(given, str) else list(given or ())
    values = values_of(flat)
    if values is not None:
        of_values = {type_of(value) for value in values}
        if not found:
            return [kind for kind in TYPES if kind in of_values]
        return [k for k in found if k in of_values or (k == "number" and "integer" in of_values)]
    if not found:
        return [kind for kind, keywords in _TELLING.items() if any(keyword in flat for keyword in keywords)]
    return list(dict.fromkeys(found))


def values_of(flat: JsonObject) -> list[Any] | None:
    """The values that `const` and `enum` leave; None: neither stands there."""
    values = list(flat["enum"]) if "enum" in flat else None
    if "const" in flat:
        const = compact(flat["const"])
        return [flat["const"]] if values is None or any(compact(value) == const for value in values) else []
    return values


def type_of(value: object) -> str:
    """JSON Schema's word for what a JSON value is."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
