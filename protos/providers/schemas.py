"""`adapt_schema`: a JSON schema in the dialect that a vendor takes, as weak as need be and no weaker, with notes.

Codecs call it; answers are brought back by schema_values.py. Facts of the vendors' pages on structured outputs, as of
2026-11: OpenAI (strict: closed objects, all properties required; patterns, formats, ranges, lengths of lists,
recursion), Anthropic and Bedrock (closed, no recursion, no ranges, minItems 0 or 1), Gemini (`responseSchema`: a subset
of OpenAPI 3.0's; `responseJsonSchema`: one of JSON Schema's, with references).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from diptych.protos.strict_json import printable
from diptych.protos.wire_checks import JsonObject, compact

from .codec import Note
from .schema_documents import ANNOTATIONS, MAX_DEPTH, Document, Inexpressible, type_of, types_of, values_of

MAX_NODES = 4096  # of an adapted schema: references written out can multiply
MAX_TOLD_CHARS = 200  # of a keyword's value in a description
NULL_IS_ABSENT = "null stands for the absence of "  # begins the words of a note; restore() takes such nulls out
# None of these: look-around, back references, word boundaries, anchors of whole texts.
_UNCOMMON = re.compile(r"\(\?[=!<]|\\[bBAZz1-9k]")
_COMMON_FORMATS = frozenset("date-time time date duration email hostname uri ipv4 ipv6 uuid".split())
_SHAPE = frozenset("type properties required items enum anyOf description title".split())
_RANGES = frozenset("multipleOf minimum maximum exclusiveMinimum exclusiveMaximum".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dialect:
    """What a vendor takes."""

    keywords: frozenset[str]
    formats: frozenset[str] = frozenset()
    is_closed: bool = False  # additionalProperties: false in every object
    all_required: bool = False
    references: Literal["all", "acyclic", "none"] = "none"
    has_nullable: bool = False  # in place of the type null
    has_any: bool = False  # a schema may leave the type open
    most_min_items: int | None = None
    enums: Literal["scalars", "strings"] = "scalars"
    root_is_object: bool = False


_STRICT = _SHAPE | {"additionalProperties", "const", "$ref", "$defs"}
_CLOSED = _Dialect(
    keywords=_STRICT | {"format", "pattern", "default", "minItems"},
    formats=_COMMON_FORMATS,
    is_closed=True,
    references="acyclic",
    most_min_items=1,
)
_DIALECTS: dict[str, _Dialect] = {
    "openai_strict": _Dialect(
        keywords=_STRICT | _RANGES | {"pattern", "format", "minItems", "maxItems"},
        formats=_COMMON_FORMATS - {"uri"},
        is_closed=True,
        all_required=True,
        references="all",
        root_is_object=True,
    ),
    # What providers that enforce schemas in OpenAI's way have in common.
    "strict_plain": _Dialect(
        keywords=_STRICT, is_closed=True, all_required=True, references="all", root_is_object=True
    ),
    "anthropic": _CLOSED,
    "bedrock": _CLOSED,
    "gemini": _Dialect(
        keywords=_SHAPE
        | set(
            "format pattern minLength maxLength minimum maximum minItems maxItems minProperties maxProperties".split()
        )
        | {"nullable", "propertyOrdering", "default"},
        formats=frozenset({"date-time", "int32", "int64", "float", "double"}),
        has_nullable=True,
        enums="strings",
    ),
    "gemini_json": _Dialect(
        keywords=_SHAPE
        | set("format minItems maxItems minimum maximum prefixItems additionalProperties $ref $defs".split()),
        formats=frozenset({"date-time", "date", "time"}),
        references="all",
        has_any=True,
    ),
}
DIALECTS = (*_DIALECTS, "openai", "none")  # openai: any schema, which is a wish; none: no schema can be sent


def adapt_schema(schema: JsonObject, dialect: str, *, field: str = "") -> tuple[JsonObject, tuple[Note, ...]]:
    """`schema`, which stays as it is, in `dialect`, one of DIALECTS, and what was changed; `field` is its path for
    notes and errors. Every instance of `schema` is one of what comes, but for properties that it does not name, and
    (in openai_strict and strict_plain) with null for each optional property that it lacks. Raises Inexpressible.
    """
    if dialect == "openai":
        return deepcopy(schema), ()
    if dialect == "none":
        raise Inexpressible(field, "cannot be sent: this provider takes no schema")
    if dialect not in _DIALECTS:
        raise ValueError(f"there is no schema dialect {dialect[:64]!r}; those that are: {', '.join(DIALECTS)}")
    adapter = _Adapter(schema, _DIALECTS[dialect])
    try:
        return adapter.root(), tuple(Note("adapted", _at(field, path), words) for path, words in adapter.changes)
    except Inexpressible as exc:
        raise Inexpressible(_at(field, exc.path), exc.words) from None


def needs_restoring(notes: Sequence[Note]) -> bool:
    """Whether answers by the adapted schema hold nulls that the original does not allow."""
    return any(note.kind == "adapted" and note.words.startswith(NULL_IS_ABSENT) for note in notes)


def _at(field: str, path: str) -> str:
    return f"{field}.{path.removeprefix('.')}" if field and path else field or path.removeprefix(".")


class _Adapter:
    """The work on one schema."""

    def __init__(self, schema: JsonObject, dialect: _Dialect) -> None:
        self.changes: list[tuple[str, str]] = []
        self._document = Document(schema)
        self._dialect = dialect
        self._names: dict[str, str] = {}
        self._definitions: dict[str, JsonObject] = {}
        self._nodes = 0
        self._depth = 0

    def root(self) -> JsonObject:
        flat = self._document.flat(self._document.root, "", keeps=False, follows=True)
        schema = self._flat_node(flat, "")
        if self._dialect.root_is_object and schema.get("type") != "object":
            raise Inexpressible("", "must be an object at its outermost: wrap it in one with a property for the value")
        return schema | ({"$defs": self._definitions} if self._definitions else {})

    def _node(self, schema: object, path: str) -> JsonObject:
        keeps = self._dialect.references != "none"
        flat = self._document.flat(schema, path, keeps=keeps)
        if "$ref" not in flat:
            return self._flat_node(flat, path)
        reference = flat["$ref"]
        if self._dialect.references == "acyclic" and self._document.is_cyclic(reference):
            raise Inexpressible(path, "refers to itself by and by, which this provider does not take")
        return self._reference(reference, path)

    def _reference(self, pointer: str, path: str) -> JsonObject:
        if pointer == "#":
            return {"$ref": "#"}
        if pointer not in self._names:
            name = base = re.sub(r"[^A-Za-z0-9_-]", "_", pointer.rsplit("/", 1)[-1]) or "_"
            while name in self._definitions:
                name = f"{base}_{len(self._names)}"
            self._names[pointer] = name
            self._definitions[name] = {}  # its place, and its name is taken
            target = self._document.resolve(pointer, path)
            self._definitions[name] = self._node(target, pointer.removeprefix("#").replace("/", "."))
        return {"$ref": f"#/$defs/{self._names[pointer]}"}

    def _flat_node(self, flat: JsonObject, path: str) -> JsonObject:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            raise Inexpressible(path, f"grows to more than {MAX_NODES} schemas or {MAX_DEPTH} levels")
        made = self._union(flat, path) if "anyOf" in flat else self._typed(flat, path)
        self._depth -= 1
        return made

    def _union(self, flat: JsonObject, path: str) -> JsonObject:
        around = {key: value for key, value in flat.items() if key not in ANNOTATIONS and key != "anyOf"}
        branches = []
        for i, branch in enumerate(flat["anyOf"]):
            branches.append(self._node({"allOf": [branch, around]} if around else branch, f"{path}.anyOf[{i}]"))
        return self._joined(branches, self._annotated(flat, path))

    def _joined(self, branches: list[JsonObject], around: JsonObject) -> JsonObject:
        """One of `branches`."""
        inner: list[JsonObject] = []
        for branch in branches:
            is_union = branch.keys() == {"anyOf"}
            inner += [one for one in (branch["anyOf"] if is_union else [branch]) if one not in inner]
        if not self._dialect.has_nullable:
            return inner[0] | around if len(inner) == 1 and "$ref" not in inner[0] else around | {"anyOf": inner}
        some = [branch for branch in inner if branch.get("type") != "null"]
        made = some[0] | around if len(some) == 1 else around | {"anyOf": some}
        if not some:
            return {"type": "null"} | around
        return made | ({"nullable": True} if len(some) < len(inner) else {})

    def _typed(self, flat: JsonObject, path: str) -> JsonObject:
        types = types_of(flat)
        if not types:
            if values_of(flat) == []:
                raise Inexpressible(path, "allows no value: const, enum and type exclude each other")
            if not self._dialect.has_any:
                raise Inexpressible(path, "allows any value, which this provider does not take: give it a type")
            return self._restricted({}, flat, path, "")
        some = [kind for kind in types if kind != "null"]
        if not some:
            return {"type": "null"} | self._annotated(flat, path)
        if len(some) == 1:
            made = self._of_type(flat, some[0], path)
            return self._nullable(made) if "null" in types else made
        plain = {key: value for key, value in flat.items() if key not in ANNOTATIONS}
        branches = [self._of_type(plain, kind, path) for kind in some]
        branches += [{"type": "null"}] if "null" in types else []
        return self._joined(branches, self._annotated(flat, path))

    def _of_type(self, flat: JsonObject, kind: str, path: str) -> JsonObject:
        made: JsonObject = {"type": kind}
        values = values_of(flat)
        if values is not None:
            return self._valued(made, flat, values, path)
        if kind == "object":
            made |= self._object(flat, path)
        elif kind == "array":
            made |= self._array(flat, path)
        return self._restricted(made, flat, path, kind)

    def _valued(self, made: JsonObject, flat: JsonObject, values: list[Any], path: str) -> JsonObject:
        kinds = ("integer", "number") if made["type"] == "number" else (made["type"],)
        fit = [value for value in values if type_of(value) in kinds]
        if any(isinstance(value, dict | list) for value in fit):
            raise Inexpressible(
                path, "allows certain objects or lists, which this provider does not take: give it a type"
            )
        kept = {key: value for key, value in flat.items() if key in ANNOTATIONS}
        if self._dialect.enums == "strings" and (made["type"] != "string" or "" in fit):
            return self._restricted(made, kept | {"enum": fit}, path, "")
        if "const" in flat and "const" in self._dialect.keywords:
            return made | {"const": fit[0]} | self._annotated(flat, path)
        return made | {"enum": fit} | self._annotated(flat, path)

    def _nullable(self, made: JsonObject) -> JsonObject:
        """What allows null, too."""
        if self._dialect.has_nullable:
            return made | {"nullable": True}
        if "$ref" in made or "const" in made:
            around = {key: made[key] for key in made.keys() & ANNOTATIONS}
            inner = {key: value for key, value in made.items() if key not in ANNOTATIONS}
            return around | {"anyOf": [inner, {"type": "null"}]}
        if "anyOf" in made:
            has_null = any(_takes_null(branch) for branch in made["anyOf"])
            return made if has_null else made | {"anyOf": [*made["anyOf"], {"type": "null"}]}
        if _takes_null(made):
            return made
        return made | {"type": [made["type"], "null"]} | ({"enum": [*made["enum"], None]} if "enum" in made else {})

    def _object(self, flat: JsonObject, path: str) -> JsonObject:
        properties, more = flat.get("properties"), flat.get("additionalProperties")
        required = list(flat.get("required", ()))
        is_open = isinstance(more, dict) and bool(more)
        if self._dialect.is_closed:
            if is_open or flat.get("patternProperties") or (not properties and (more or properties is more is None)):
                words = "is an object of any properties, which this provider does not take"
                raise Inexpressible(path, f"{words}: name them, or ask for a list of names and values")
            if more is not None and more is not False:
                self.changes.append((path, "no properties but those that are named"))
        found = {name: self._node(inner, f"{path}.properties.{name}") for name, inner in (properties or {}).items()}
        made: JsonObject = {"properties": found} if properties is not None else {}
        if unknown := [name for name in required if name not in found]:
            if self._dialect.is_closed:
                raise Inexpressible(path, f"requires {printable(unknown[0], 40)}, which is not in its properties")
            self.changes.append((path, f"{printable(', '.join(unknown))} not required, as it is not in properties"))
            required = [name for name in required if name in found]
        if self._dialect.all_required:
            required = self._require_all(found, required, path)
        if required or (self._dialect.all_required and found):
            made["required"] = required
        if self._dialect.is_closed:
            made["additionalProperties"] = False
        elif "additionalProperties" in self._dialect.keywords and more is not None:
            made["additionalProperties"] = (
                self._node(more, f"{path}.additionalProperties") if is_open else bool(more) or more == {}
            )
        if "propertyOrdering" in self._dialect.keywords and len(found) > 1:
            made["propertyOrdering"] = list(found)
        return made

    def _require_all(self, found: dict[str, JsonObject], required: list[str], path: str) -> list[str]:
        absent = []
        for name in found.keys() - set(required):
            if not self._allows_null(found[name]):
                absent.append(name)
            found[name] = self._nullable(found[name])
        if absent:
            names = ", ".join(sorted(absent, key=list(found).index))
            self.changes.append((path, NULL_IS_ABSENT + printable(names, 200)))
        return list(found)

    def _allows_null(self, made: JsonObject) -> bool:
        if "$ref" in made:
            name = made["$ref"].rsplit("/", 1)[-1]
            return name != "#" and _takes_null(self._definitions[name])
        return _takes_null(made)

    def _array(self, flat: JsonObject, path: str) -> JsonObject:
        items, first = flat.get("items"), flat.get("prefixItems")
        if isinstance(items, list):  # draft 7's way to say prefixItems
            items, first = flat.get("additionalItems"), items
        if not isinstance(first, list):
            if (items is None or items is True or items == {}) and not self._dialect.has_any:
                raise Inexpressible(path, "is a list of anything, which this provider does not take: give it items")
            return {} if items is None else {"items": self._node(items, f"{path}.items")}
        places = [self._node(entry, f"{path}.prefixItems[{i}]") for i, entry in enumerate(first)]
        is_bounded = items is False
        rest = [] if is_bounded or items is None or items is True else [self._node(items, f"{path}.items")]
        lengths = {"maxItems": len(first)} if is_bounded and "maxItems" in self._dialect.keywords else {}
        if "prefixItems" in self._dialect.keywords:
            return {"prefixItems": places, **lengths} | ({"items": rest[0]} if rest else {})
        words = "a list whose items are each like one of those of the fixed places"
        is_open = (items is None or items is True) and flat.get("maxItems") != len(first)
        self.changes.append((path, words + (", and there are no others" if is_open else "")))
        return {"items": self._joined([*places, *rest], {}), **lengths}

    def _annotated(self, flat: JsonObject, path: str) -> JsonObject:
        return self._restricted({}, {key: flat[key] for key in flat if key in ANNOTATIONS}, path, "")

    def _restricted(self, made: JsonObject, flat: JsonObject, path: str, kind: str) -> JsonObject:
        """`made` with the rest of what `flat` says, in keywords or in the description."""
        told: dict[str, Any] = {}
        for key, value in flat.items():
            if key in made or key in ("type", "const", "anyOf", "prefixItems", "items", "required"):
                continue
            if key in ("properties", "additionalProperties") and (kind or value is False):
                if key == "additionalProperties" and isinstance(value, dict) and value and not self._dialect.is_closed:
                    told |= {} if key in self._dialect.keywords else {key: value}
            elif key == "default" and value is None:
                continue
            elif self._takes(key, value, made):
                made[key] = value
            else:
                told[key] = value
        for key, other, step in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
            if kind == "integer" and type(told.get(key)) is int and other in self._dialect.keywords - flat.keys():
                made[other] = told.pop(key) + step
        if "minItems" in told and self._dialect.most_min_items is not None:
            made["minItems"] = self._dialect.most_min_items
        if told:
            words = "; ".join(f"{key}: {_told(value)}" for key, value in told.items())
            made["description"] = (
                f"{flat['description']} ({words})" if isinstance(flat.get("description"), str) else words
            )
            if lost := [printable(key) for key in told if key not in ANNOTATIONS]:
                self.changes.append((path, f"{', '.join(lost)} told in the description"))
        return made

    def _takes(self, key: str, value: Any, made: JsonObject) -> bool:
        if key not in self._dialect.keywords:
            return False
        if key == "format":
            return value in self._dialect.formats
        if key == "pattern":
            return isinstance(value, str) and _UNCOMMON.search(value) is None
        if key == "enum":
            return self._dialect.enums == "scalars"
        if key == "minItems":
            most = self._dialect.most_min_items
            return most is None or value <= most
        return True


def _takes_null(made: JsonObject) -> bool:
    kinds = made.get("type")
    return (
        kinds == "null" or (isinstance(kinds, list) and "null" in kinds) or any(map(_takes_null, made.get("anyOf", ())))
    )


def _told(value: object) -> str:
    return printable(value if isinstance(value, str) else compact(value), MAX_TOLD_CHARS)
