"""The type of a call's result: its schema for the model, and the value in an answer's text.

Any type that pydantic's TypeAdapter takes. What is no JSON object is put into one, because some providers take nothing
else: {"value": ...}.
"""

from __future__ import annotations

import collections.abc
import copy
import functools
import json
import re
from typing import Any, Generic, TypeVar, get_args, get_origin

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from pydantic_core import from_json

from diptych.protos.openai_output import OutputForm, read_form

from .closed_schema import ClosedJsonSchema, fault_of
from .errors import DefinitionError, Error, InvalidOutput
from .json_text import last_json
from .reports import report_of
from .strict_json import validated
from .tool_context import WITHIN, stands_within

T = TypeVar("T")
JsonObject = dict[str, Any]
WRAPPED = "value"
_WRAPPER = re.compile(r'\{\s*"value"\s*:(.*)\}\s*', re.DOTALL)
_LAZY = (
    collections.abc.Iterable,
    collections.abc.Iterator,
    collections.abc.Generator,
)  # pydantic would read these late


class Output(Generic[T]):
    """`is_strict`: the types of JSON are those of the schema; else "25" is taken for 25 (pydantic's lax mode).

    Raises DefinitionError, which names `name` (the function) and the field that cannot be told to a model.
    """

    def __init__(self, kind: type[T] | Any, *, name: str = "", is_strict: bool = True) -> None:
        self.kind = _eager(kind)
        self.is_strict = is_strict
        self.adapter: TypeAdapter[T]
        self.adapter, schema = _readable(self.kind, name or _name_of(kind))
        self.is_wrapped = not _is_object(schema)
        self.schema: JsonObject = _wrapped(schema) if self.is_wrapped else _rooted(schema)
        self.name = _name_of(kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.kind, self.name, self.is_strict)

    def held(self, *, is_strict: bool) -> Output[T]:
        """The same, as strict as said."""
        other = copy.copy(self)
        other.is_strict = is_strict
        return other

    def parse(self, text: str, context: Any = None) -> T:
        """The value in `text`. Raises InvalidOutput with a report of each field."""
        return self.checked(last_json(text), text, context)

    def checked(self, document: str, text: str, context: Any = None) -> T:
        """The value of the JSON `document`, which was found in `text`."""
        try:
            return self._value(document, context)
        except (ValueError, RecursionError) as exc:
            raise invalid(exc, self.name, document, text, (WRAPPED,) if self.is_wrapped else ()) from exc

    def _value(self, document: str, context: Any) -> T:
        inner = _unwrapped(document) if self.is_wrapped else None
        if inner is None:
            return validated(self.adapter, document, strict=self.is_strict, context=context)
        try:
            return validated(self.adapter, inner, strict=self.is_strict, context=context)
        except ValidationError as inside:
            raise_own(inside)
            try:  # an object of the type's own that has just this one field, from a model that was not held to a form
                return validated(self.adapter, document, strict=self.is_strict, context=context)
            except ValidationError:
                raise inside from None

    @property
    def response_format(self) -> JsonObject:
        """As OpenAI's field of this name."""
        return {"type": "json_schema", "json_schema": {"name": self.name[:64] or "answer", "schema": self.schema}}

    @functools.cached_property
    def form(self) -> OutputForm:
        """The same, read once for all requests. Raises InvalidRequest for a schema that none may hold."""
        form = read_form({"response_format": self.response_format})
        assert form is not None
        return form


def _again(kind: Any, name: str, is_strict: bool) -> Output[Any]:
    output: Output[Any] = Output(kind, is_strict=is_strict)
    output.name = name
    return output


def invalid(
    error: Exception, name: str, document: str, text: str, prefix: tuple[str, ...] = (), base: str = ""
) -> InvalidOutput:
    """The error for what validating `document` raised; `base` is the pointer to it, where it is a part. Raises an
    error of this package that came from a validator: a call that it made, and that failed, is no fault of the answer.
    """
    raise_own(error)
    report = report_of(error, document, text, prefix, base)
    return InvalidOutput(f"the answer is no {name}:\n{report}", report)


def raise_own(error: Exception) -> None:
    """See invalid: pydantic takes every ValueError for a fault of the value."""
    if isinstance(error, ValidationError):
        for one in error.errors(include_url=False, include_input=False):
            if isinstance(cause := one.get("ctx", {}).get("error"), Error):
                raise cause


def _unwrapped(document: str) -> str | None:
    """The text of the one member `value`; None where there are others, or none."""
    found = _WRAPPER.fullmatch(document)
    if found is None:
        return None
    try:
        value = from_json(document)
    except ValueError:
        return None
    if value.keys() != {WRAPPED}:
        return None
    inner = found[1]
    try:
        from_json(inner)
    except ValueError:  # the member is there twice: the last one counts, as everywhere
        return json.dumps(value[WRAPPED])
    return inner


def _eager(kind: Any) -> Any:
    if get_origin(kind) in _LAZY or kind in _LAZY:
        return list[get_args(kind)[:1] or Any]  # type: ignore[misc]  # pydantic reads it as any other
    return kind


def _readable(kind: Any, where: str) -> tuple[TypeAdapter[Any], JsonObject]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        _complete(adapter)
        return adapter, adapter.json_schema(mode="validation", schema_generator=ClosedJsonSchema)
    except DefinitionError as exc:
        raise DefinitionError(f"{where}: the result's type: {exc}") from exc
    except PydanticUndefinedAnnotation as exc:
        if stands_within(kind):
            raise DefinitionError(f"{where}: the result's type: {WITHIN}") from exc
        if isinstance(kind, str):
            raise _no_type(kind, where) from exc
        raise DefinitionError(
            f"{where}: the result's type names {exc.name!r}, which is not defined where the type is: define it at the "
            f"top of the module, or call model_rebuild() once it is"
        ) from exc
    except PydanticInvalidForJsonSchema as exc:
        raise DefinitionError(
            f"{where}: no JSON can be a {_path_of(kind)} of the result's type: give it a type that has a JSON form, "
            f"or leave it out (Field(exclude=True) does not: it is about writing); pydantic says: {fault_of(exc)}"
        ) from exc
    except PydanticSchemaGenerationError as exc:
        if not _is_type(kind):
            raise _no_type(kind, where) from exc
        raise DefinitionError(
            f"{where}: the result's type has a part that pydantic cannot read: {fault_of(exc)}; make that class a "
            f"BaseModel or a dataclass, or give it __get_pydantic_core_schema__"
        ) from exc
    except PydanticUserError as exc:
        raise DefinitionError(f"{where}: no JSON schema can be made of the result's type: {exc.message}") from exc
    except Exception as exc:
        if not _is_type(kind):
            raise _no_type(kind, where) from exc
        raise DefinitionError(
            f"{where}: the result's type cannot be read: {type(exc).__name__}: {fault_of(exc)}"
        ) from exc


def _complete(adapter: TypeAdapter[Any]) -> None:
    """What was not defined yet is looked up anew. Raises PydanticUndefinedAnnotation with its name."""
    if not adapter.pydantic_complete:
        adapter.rebuild(force=True, raise_errors=True)


def _is_type(kind: Any) -> bool:
    """Whether it is a class, or made of them by typing; else it is a value."""
    return isinstance(kind, type) or get_origin(kind) is not None or type(kind).__module__ in ("typing", "types")


def _no_type(kind: Any, where: str) -> DefinitionError:
    found = type(kind).__name__
    remedy = f"output={found}" if isinstance(kind, BaseModel) else "a class, or list[X], dict[str, X], X | None, ..."
    return DefinitionError(f"{where}: output= takes a type, and this is a value, a {found}: write {remedy}")


def _path_of(kind: Any) -> str:
    """Which field of a model has no JSON form, in dotted form."""
    fields = getattr(kind, "model_fields", None) or {}
    for name, field in fields.items():
        try:
            TypeAdapter(field.annotation).json_schema(mode="validation", schema_generator=ClosedJsonSchema)
        except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
            inner = _path_of(field.annotation)
            return f"{kind.__name__}.{name}" if "." not in inner else f"{kind.__name__}.{name} ({inner})"
        except PydanticUserError:
            continue
    return getattr(kind, "__name__", str(kind))


def _is_object(schema: JsonObject) -> bool:
    return _root(schema).get("type") == "object"


def _root(schema: JsonObject) -> JsonObject:
    """What the schema's own $ref, as recursive types have it, refers to."""
    root, seen = schema, 0
    while "$ref" in root and seen < 8:
        root = schema.get("$defs", {}).get(root["$ref"].removeprefix("#/$defs/"), {})
        seen += 1
    return root


def _rooted(schema: JsonObject) -> JsonObject:
    """Without a $ref at the top, which some providers do not follow."""
    if "$ref" not in schema:
        return schema
    return {**_root(schema), "$defs": schema["$defs"]}


def _wrapped(schema: JsonObject) -> JsonObject:
    inner = {name: value for name, value in schema.items() if name != "$defs"}
    outer: JsonObject = {
        "type": "object",
        "properties": {WRAPPED: inner},
        "required": [WRAPPED],
        "additionalProperties": False,
    }
    return outer | ({"$defs": schema["$defs"]} if "$defs" in schema else {})


def _name_of(kind: Any) -> str:
    if isinstance(kind, type) and get_origin(kind) is None:
        name = kind.__name__
        if issubclass(kind, BaseModel):
            origin = kind.__pydantic_generic_metadata__["origin"]
            name = name if origin is None else origin.__name__
    else:
        name = str(kind).replace("typing.", "")
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in name)[:64].strip("_") or "answer"
