"""The declarations as a page: docs/api-fields.md, written by `make docs`; a test compares the two.

Every operation with what it reads, field by field; then the objects that stand in fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .document import operations, shapes
from .shapes import REF, Field, JsonObject, Operation, Shape

_HEAD = """# Every field of every endpoint

Made by `make docs` from the declarations in `cluster/api/description`; do not edit. `GET /openapi.json` tells the same,
and the answers, as OpenAPI 3.1. A test sends each field: what is accepted, and what is not, which is refused by name.

*honoured*: it does what stands there. *only at its default*: taken, as it changes nothing; another value is refused.
*refused*: only null is taken. Null means: not given. A field that is not listed is refused.
"""
_COLUMNS = "| field | accepted | default | standing | meaning |\n|---|---|---|---|---|"
_NAMES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    listed = operations()
    parts.append("| method | path | what it does | a key needs |\n|---|---|---|---|")
    for one in listed:
        scope = f"`{one.scope}`" if one.scope else "no key"
        parts[-1] += f"\n| {one.method} | `{one.path}` | {one.words} | {scope} |"
    for one in listed:
        parts += _operation(one)
    parts.append("\n## Objects in requests")
    for shape in _objects(listed):
        parts += _shape(shape)
    return "\n".join(parts) + "\n"


def _operation(one: Operation) -> Iterator[str]:
    outside = [*one.path_fields, *one.query, *one.headers]
    if one.body is None and not outside:
        return
    yield f"\n## {one.method} {one.path}\n\n{_sentence(one.words)}\n"
    if outside:
        yield _COLUMNS
        for place, fields in (("path", one.path_fields), ("query", one.query), ("header", one.headers)):
            yield from (_row(field, f" ({place})") for field in fields)
        yield ""
    if one.body is None:
        return
    for shape in one.body.alternatives():
        if len(one.body.alternatives()) > 1:
            yield f"{_sentence(shape.words)}\n"
        yield _COLUMNS
        yield from map(_row, shape.fields)
        yield ""


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:].rstrip(".") + "."


def _objects(listed: Iterable[Operation]) -> list[Shape]:
    """Those that stand in fields of requests, by name."""
    known = shapes()
    bodies = [shape for one in listed if one.body is not None for shape in one.body.alternatives()]
    found: dict[str, Shape] = {}
    left = list(bodies)
    while left:
        for field in left.pop().fields:
            for name in _refs(field.schema):
                if name not in found:
                    found[name] = known[name]
                    left.append(known[name])
    return [found[name] for name in sorted(found)]


def _shape(shape: Shape) -> Iterator[str]:
    yield f"\n### {shape.name}\n\n{_sentence(shape.words)}\n"
    yield _COLUMNS
    yield from map(_row, shape.fields)


def _row(field: Field, place: str = "") -> str:
    accepted = ("**required** " if field.is_required else "") + _told(field.schema)
    cells = [f"`{field.name}`{place}", accepted, field.default, field.standing.value, field.words]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _refs(schema: object) -> set[str]:
    if isinstance(schema, dict):
        own = {schema["$ref"].removeprefix(REF)} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*(_refs(inner) for inner in schema.values()))
    return set().union(*(_refs(inner) for inner in schema)) if isinstance(schema, list) else set()


def _told(schema: JsonObject) -> str:
    """A schema in words. Null goes without saying."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REF)
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(f"`{_value(value)}`" for value in schema["enum"] if value is not None) or "`null`"
    if "anyOf" in schema:
        branches = [_told(branch) for branch in schema["anyOf"] if branch != {"type": "null"}]
        return "; or ".join(dict.fromkeys(branches))
    kinds = schema.get("type", "any value")
    kind = next(one for one in kinds if one != "null") if isinstance(kinds, list) else kinds
    if kind == "array":
        return f"list{_span(schema, 'minItems', 'maxItems')} of: {_told(schema['items'])}"
    if kind == "object":
        return _told_object(schema)
    words: str = _NAMES.get(kind, kind)
    if kind == "string":
        length = _span(schema, "minLength", "maxLength")
        words += f",{length} characters" if length else ""
        if schema.get("format"):
            words += f", {schema['format']}"
        return words + (f", matching `{schema['pattern']}`" if "pattern" in schema else "")
    if "exclusiveMinimum" in schema:
        words += f" above {schema['exclusiveMinimum']:g}"
    if "exclusiveMaximum" in schema:
        words += f" below {schema['exclusiveMaximum']:g}"
    return words + _span(schema, "minimum", "maximum")


def _told_object(schema: JsonObject) -> str:
    inner = schema.get("additionalProperties")
    most = f" of at most {schema['maxProperties']} entries" if "maxProperties" in schema else ""
    names = schema.get("propertyNames", {})
    if "pattern" in names:
        most += f", names matching `{names['pattern']}`"
    if "maxLength" in names:
        most += f", names of at most {names['maxLength']} characters"
    return f"object{most}" + (f", values: {_told(inner)}" if isinstance(inner, dict) and inner else "")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("'", '"') if isinstance(value, list | dict) else f"{value}"


_POWERS = {2**exponent - 1: f"2^{exponent} - 1" for exponent in (31, 32, 63, 64)}


def _number(value: float) -> str:
    if value in _POWERS:
        return _POWERS[int(value)]
    if -value - 1 in _POWERS or -value in (2**31, 2**63):
        return f"-2^{31 if -value == 2**31 else 63}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _span(schema: JsonObject, least: str, most: str) -> str:
    low, high = schema.get(least), schema.get(most)
    if low is not None and high is not None:
        return f" {_number(low)} to {_number(high)}"
    if low is not None:
        return f" from {_number(low)}"
    return f" up to {_number(high)}" if high is not None else ""
