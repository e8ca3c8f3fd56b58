"""The words in which the API is declared: fields, shapes made of fields, operations; and schemas of plain values.

The declarations are the modules beside this one; document.py makes OpenAPI of them, tables.py the pages in docs/. Knows
no endpoint, no reader and no connection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, TypeAdapter

JsonObject = dict[str, Any]
REF = "#/components/schemas/"


class Standing(Enum):
    """What becomes of a field that a client sends."""

    HONOURED = "honoured"
    FIXED = "only at its default"  # and any other value is refused by name
    REFUSED = "refused"  # every value but null, with the reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A member of an object, a query parameter or a header. `schema` describes every value that is accepted; `default`
    is what holds where it is left out, in words.
    """

    name: str
    words: str
    schema: JsonObject
    standing: Standing = Standing.HONOURED
    is_required: bool = False
    default: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An object with fields. Requests' objects take no others; `is_open` ones, and answers, may have more."""

    name: str
    words: str
    fields: tuple[Field, ...] = ()
    is_open: bool = False
    one_of: tuple[Shape, ...] = ()  # it is one of these, and has no fields of its own

    @property
    def ref(self) -> JsonObject:
        """The schema that stands for it elsewhere."""
        return {"$ref": REF + self.name}

    @property
    def required(self) -> tuple[str, ...]:
        """The names that must be there."""
        return tuple(one.name for one in self.fields if one.is_required)

    def schema(self) -> JsonObject:
        """As a JSON schema."""
        if self.one_of:
            return {"description": self.words, "anyOf": [shape.ref for shape in self.one_of]}
        found: JsonObject = {"type": "object", "description": self.words}
        found["properties"] = {one.name: _property(one) for one in self.fields}
        if self.required:
            found["required"] = list(self.required)
        if not self.is_open:
            found["additionalProperties"] = False
        return found

    def alternatives(self) -> tuple[Shape, ...]:
        """The shapes with fields: itself, or those it is one of."""
        return self.one_of or (self,)

    def without(self, *names: str) -> tuple[Field, ...]:
        """Its fields but those of these names, which it has."""
        missing = set(names) - {one.name for one in self.fields}
        assert not missing, missing
        return tuple(one for one in self.fields if one.name not in names)


def _property(one: Field) -> JsonObject:
    words = one.words
    if one.standing is not Standing.HONOURED:
        words = f"{one.standing.value.capitalize()}: {words}"
    if one.default:
        words += f". Default: {one.default}"
    return {**one.schema, "description": words} if words else one.schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One way in which an operation answers. `media` by content type; `headers` by name, with their words."""

    status: int
    words: str
    media: Mapping[str, JsonObject] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    links: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A method of a path. `scope`: what a key must be good for; empty where nobody is asked for one.

    `errors`: statuses of the error tree besides those that every operation has; `error_schema`: theirs, where it is
    not that of OpenAI's shape. `events`: the schema of one event where it can answer with a stream.
    """

    id: str
    method: str
    path: str
    tag: str
    words: str
    scope: str
    replies: tuple[Reply, ...]
    body: Shape | None = None
    body_media: str = "application/json"
    path_fields: tuple[Field, ...] = ()
    query: tuple[Field, ...] = ()
    headers: tuple[Field, ...] = ()
    errors: frozenset[int] = frozenset()
    error_schema: JsonObject | None = None
    events: JsonObject | None = None
    last_event: str = ""  # data that is no JSON and ends a stream


# --- schemas of plain values ------------------------------------------------------------------------------------------


def text(
    least: int = 0, most: int | None = None, *, pattern: str | None = None, example: str | None = None
) -> JsonObject:
    """A string of so many characters."""
    found: JsonObject = {"type": "string"}
    if example is not None:
        found["examples"] = [example]
    if least:
        found["minLength"] = least
    if most is not None:
        found["maxLength"] = most
    if pattern is not None:
        found["pattern"] = pattern
    return found


def whole(least: int | None = None, most: int | None = None) -> JsonObject:
    """A whole number within these bounds, both included."""
    found: JsonObject = {"type": "integer"}
    if least is not None:
        found["minimum"] = least
    if most is not None:
        found["maximum"] = most
    return found


def number(least: float | None = None, most: float | None = None) -> JsonObject:
    """A number within these bounds, both included."""
    found: JsonObject = {"type": "number"}
    if least is not None:
        found["minimum"] = least
    if most is not None:
        found["maximum"] = most
    return found


def flag() -> JsonObject:
    """True or false."""
    return {"type": "boolean"}


def one_of(*values: object) -> JsonObject:
    """One of these values."""
    return {"enum": list(values)}


def many(items: JsonObject, least: int = 0, most: int | None = None) -> JsonObject:
    """A list."""
    found: JsonObject = {"type": "array", "items": items}
    if least:
        found["minItems"] = least
    if most is not None:
        found["maxItems"] = most
    return found


def mapping(values: JsonObject, *, most: int | None = None, names: JsonObject | None = None) -> JsonObject:
    """An object with names of the client's choice."""
    found: JsonObject = {"type": "object", "additionalProperties": values}
    if most is not None:
        found["maxProperties"] = most
    if names is not None:
        found["propertyNames"] = names
    return found


def any_object() -> JsonObject:
    """Any object."""
    return {"type": "object", "additionalProperties": True}


def either(*schemas: JsonObject) -> JsonObject:
    """What one of several schemas allows."""
    return {"anyOf": list(schemas)}


def nullable(schema: JsonObject) -> JsonObject:
    """`schema`, or null."""
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], *([] if None in schema["enum"] else [None])]}
    kind = schema.get("type")
    if isinstance(kind, list):
        return schema
    if kind is not None:
        return {**schema, "type": [kind, "null"]}
    if "anyOf" in schema:
        return schema if _NULL in schema["anyOf"] else {**schema, "anyOf": [*schema["anyOf"], _NULL]}
    return {"anyOf": [schema, _NULL]} if schema else schema


_NULL: JsonObject = {"type": "null"}


# --- fields -----------------------------------------------------------------------------------------------------------


def need(name: str, schema: JsonObject, words: str) -> Field:
    """A field that must be there."""
    return Field(name=name, schema=schema, words=words, is_required=True)


def may(name: str, schema: JsonObject, words: str, default: str = "") -> Field:
    """A field that may be left out, or null, which is the same."""
    return Field(name=name, schema=nullable(schema), words=words, default=default)


def fixed(name: str, values: Iterable[object], words: str) -> Field:
    """A known field of which only these values are taken; they change nothing."""
    accepted = list(values)
    standing = Standing.REFUSED if accepted == [None] else Standing.FIXED
    return Field(name=name, schema=one_of(*accepted), words=words, standing=standing)


def told(name: str, schema: JsonObject, words: str = "") -> Field:
    """A field of an answer that is always there."""
    return Field(name=name, schema=schema, words=words, is_required=True)


def tells(name: str, schema: JsonObject, words: str = "") -> Field:
    """A field of an answer that is there where it has something to tell."""
    return Field(name=name, schema=schema, words=words)


def needed(fields: Iterable[Field], *names: str) -> tuple[Field, ...]:
    """The fields, those of these names no longer optional."""
    return tuple(replace(one, is_required=True) if one.name in names else one for one in fields)


def of_model(model: type[BaseModel], name: str) -> JsonObject:
    """The schema of a field of a pydantic model, by its annotation: bounds stand in one place. Not for fields that a
    function of their own validates.
    """
    found = model.model_fields[name]
    kind: Any = found.annotation
    if found.metadata:
        kind = Annotated[(kind, *found.metadata)]
    return _plain(TypeAdapter(kind).json_schema())


def of_dataclass(kind: type, name: str, words: str) -> tuple[Shape, ...]:
    """The shape of a dataclass that an answer tells as it is, and before it the shapes of those inside it."""
    hints = get_type_hints(kind)
    found: list[Shape] = []
    fields = []
    for one in dataclasses.fields(kind):
        inner = hints[one.name]
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            shapes = of_dataclass(inner, inner.__name__, (inner.__doc__ or "").partition("\n")[0])
            found += [shape for shape in shapes if shape not in found]
            fields.append(told(one.name, shapes[-1].ref))
        else:
            fields.append(told(one.name, _plain(TypeAdapter(inner).json_schema())))
    return (*found, Shape(name=name, words=words, fields=tuple(fields), is_open=True))


def _plain(schema: JsonObject) -> JsonObject:
    found = {key: value for key, value in schema.items() if key not in ("title", "default")}
    if "const" in found:
        return {"enum": [found["const"]]}
    if "enum" in found:
        return {"enum": found["enum"]}
    if "anyOf" in found:
        branches = [_plain(branch) for branch in found["anyOf"]]
        plain = [branch for branch in branches if branch != _NULL]
        if len(plain) == 1 and len(branches) == 2:
            return nullable(plain[0])
        found["anyOf"] = branches
    if found.get("type") == "integer":
        if "exclusiveMaximum" in found:
            found["maximum"] = found.pop("exclusiveMaximum") - 1
        if "exclusiveMinimum" in found:
            found["minimum"] = found.pop("exclusiveMinimum") + 1
    return found
