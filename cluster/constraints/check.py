"""Refuses what is no JSON Schema, or none that an answer could be made for, naming the place and the remedy.

`schema.judge` calls it first, so that everything behind it may rely on the types of a schema's values. It does not know
what a grammar can enforce.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn

from diptych.cluster.constraints import keywords, patterns
from diptych.cluster.constraints.keywords import Draft
from diptych.cluster.constraints.paths import joined, shortened, step
from diptych.cluster.constraints.references import References, in_circle, index, part_path, parts
from diptych.protos.errors import InvalidRequest

MAX_SCHEMA_BYTES: Final = 64 << 10  # of compact JSON
MAX_NESTING: Final = 100
MAX_COUNT: Final = 100_000  # characters, items or properties that an answer must at least have
MAX_ENUM: Final = 4096

_MOST: Final = sys.float_info.max
_DRAFTS: Final = {f"json-schema.org/{draft.value}/schema": draft for draft in Draft}


@dataclass(frozen=True, slots=True)
class Checked:
    """A schema without formal errors. `ignored`: paths of words that JSON Schema does not know and that say nothing."""

    schema: object
    draft: Draft
    references: References
    ignored: tuple[str, ...]


def check(schema: object, where: str = "") -> Checked:
    """The schema's draft and references; `where` is the request's field. Raises InvalidRequest naming the place."""
    if nesting(schema) > MAX_NESTING:
        raise InvalidRequest(
            f"{where or 'the schema'}: nested deeper than {MAX_NESTING} levels; name deep parts in $defs and use $ref",
            where or None,
        )
    size = len(compact(schema).encode(errors="surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"{where or 'the schema'}: {size} bytes of JSON, at most {MAX_SCHEMA_BYTES} are taken; "
            "leave out descriptions and examples, and name what occurs repeatedly in $defs",
            where or None,
        )
    if not _is_unicode(schema):
        told = "holds half of a character (a lone surrogate), which no answer can have"
        raise InvalidRequest(f"{where or 'the schema'}: {told}", where or None)
    walk = _Walk(where, _draft(schema, where), index(schema))
    walk.schema(schema, "")
    while walk.pending:
        walk.schema(*walk.pending.pop())
    path = in_circle(walk.references, walk.referring)
    if path is not None:
        walk.fail(
            path,
            "leads in a circle: the schema is a part of itself for the same value; refer to it from within properties "
            "or items, or as one of several alternatives",
        )
    return Checked(schema, walk.draft, walk.references, tuple(walk.ignored))


def _is_unicode(value: object) -> bool:
    try:
        compact(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def compact(value: object) -> str:
    """The shortest JSON text of a value, its keys in their order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def nesting(value: object) -> int:
    """How many objects and arrays are open at the deepest place. Does not recurse."""
    deepest, layer = 0, [value]
    while layer := [v for v in layer if isinstance(v, dict | list)]:
        deepest += 1
        layer = [item for v in layer for item in (v.values() if isinstance(v, dict) else v)]
    return deepest


def _draft(schema: object, where: str) -> Draft:
    named = schema.get("$schema") if isinstance(schema, dict) else None
    if isinstance(named, str):
        plain = named.removesuffix("#").split("://", 1)[-1].rstrip("/")
        if plain == "json-schema.org/schema":
            return Draft.DRAFT_2020_12
        if plain not in _DRAFTS:
            known = ", ".join(f"https://{address}" for address in _DRAFTS)
            path = joined(where, "$schema")
            raise InvalidRequest(f"{path}: unknown draft {shortened(named, 80)!r}; known are {known}", path)
        return _DRAFTS[plain]
    return _assumed(schema)


def _assumed(schema: object) -> Draft:
    """2020-12 unless the schema is written in an older way that would be wrong there."""
    stack = [schema]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            if isinstance(part.get("exclusiveMinimum"), bool) or isinstance(part.get("exclusiveMaximum"), bool):
                return Draft.DRAFT_4
            if isinstance(part.get("items"), list) or "additionalItems" in part:
                return Draft.DRAFT_7
            stack.extend(inner for _, _, inner in parts(part))
    return Draft.DRAFT_2020_12


@dataclass(slots=True)
class _Walk:
    where: str
    draft: Draft
    references: References
    ignored: list[str] = field(default_factory=list)
    pending: list[tuple[object, str]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    referring: list[tuple[dict[str, object], str]] = field(default_factory=list)  # schemas with a $ref, its path

    def fail(self, path: str, message: str) -> NoReturn:
        full = joined(self.where, path)
        raise InvalidRequest(f"{full or 'the schema'}: {message}", full or None)

    def schema(self, schema: object, path: str) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            self.fail(path, f"a schema is an object, true or false, not {_kind(schema)}")
        if id(schema) in self.seen:
            return
        self.seen.add(id(schema))
        if "$ref" in schema and self.draft.ref_hides_siblings:
            self.reference(schema, "$ref", path)
            for word in ("$defs", "definitions"):
                self.mapping(schema.get(word, {}), step(path, word))
            return
        for word, value in schema.items():
            self.word(schema, word, value, step(path, word))
        for word, key, part in parts(schema):
            self.schema(part, part_path(path, word, key))

    def word(self, schema: dict[str, object], word: str, value: object, path: str) -> None:
        if word == "id" and self.draft is not Draft.DRAFT_4:
            self.ignored.append(path)
        elif word in keywords.DYNAMIC:
            if word.endswith("Ref"):
                self.fail(path, "references that depend on where they are used are not supported; use $ref")
        elif word in keywords.COUNTS:
            self.count(word, value, path)
        elif word in keywords.NUMBERS:
            self.number(word, value, path)
        elif word in keywords.SCHEMA_MAPS:
            self.mapping(value, path)
        elif word in keywords.SCHEMA_LISTS:
            self.schemas(value, path)
        elif word in _OTHERS:
            _OTHERS[word](self, schema, word, path)
        elif word in keywords.STRINGS and not isinstance(value, str):
            self.fail(path, f"must be a string, not {_kind(value)}")
        elif word not in keywords.KEYWORDS and word not in keywords.ANNOTATIONS and not word.startswith(("x-", "_")):
            meant = keywords.intended(word)
            if meant is not None:
                told = f"did you mean {meant!r}? Words that begin with x- or _ are taken as remarks"
                self.fail(path, f"unknown keyword {shortened(word)!r}; {told}")
            self.ignored.append(path)

    def count(self, word: str, value: object, path: str) -> None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.fail(path, f"must be a whole number of at least 0, not {_told(value)}")
        if word.startswith("min") and value > MAX_COUNT:
            self.fail(path, f"{value} is more than an answer can have; at most {MAX_COUNT} are taken")

    def number(self, word: str, value: object, path: str) -> None:
        if isinstance(value, bool) and word.startswith("exclusive"):
            if self.draft is Draft.DRAFT_4:
                return
            side = word.removeprefix("exclusive").lower()
            self.fail(path, f"true and false are of draft-04; since then the bound itself stands here, without {side}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST <= value <= _MOST:
            self.fail(path, f"must be a number, not {_told(value)}")
        if word == "multipleOf" and value <= 0:
            self.fail(path, f"must be more than 0, not {_told(value)}")

    def mapping(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            self.fail(path, f"must be an object whose values are schemas, not {_kind(value)}")
        if path.endswith("patternProperties"):
            for pattern in value:
                self.regex(pattern, step(path, pattern))

    def schemas(self, value: object, path: str) -> None:
        if not isinstance(value, list) or not value:
            self.fail(path, f"must be a list of at least one schema, not {_told(value)}")

    def type(self, schema: dict[str, object], word: str, path: str) -> None:
        value = schema[word]
        if isinstance(value, list) and not value:
            self.fail(path, "an empty list allows no value at all; name a type or leave it out")
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or name not in keywords.TYPES:
                self.fail(path, f"{_told(name)} is no type; types are {', '.join(keywords.TYPES)}")

    def enum(self, schema: dict[str, object], word: str, path: str) -> None:
        value = schema[word]
        if not isinstance(value, list) or not value:
            told = "an empty one, which no value matches" if value == [] else _told(value)
            self.fail(path, f"must be a list of at least one value, not {told}")
        if len(value) > MAX_ENUM:
            self.fail(path, f"{len(value)} values, at most {MAX_ENUM} are taken; describe them by a pattern instead")

    def required(self, schema: dict[str, object], word: str, path: str) -> None:
        value = schema[word]
        if isinstance(value, bool):
            self.fail(path, "must be a list of names; it belongs beside `properties`, not into a property")
        self.names(value, path)

    def names(self, value: object, path: str) -> None:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.fail(path, f"must be a list of property names, not {_told(value)}")
        if len(set(value)) < len(value):
            self.fail(path, "names a property twice")

    def items(self, schema: dict[str, object], word: str, path: str) -> None:
        if isinstance(schema[word], list) and self.draft is Draft.DRAFT_2020_12:
            self.fail(path, "a list of schemas is prefixItems since draft 2020-12; or name an older draft in $schema")

    def unique(self, schema: dict[str, object], word: str, path: str) -> None:
        if not isinstance(schema[word], bool):
            self.fail(path, f"must be true or false, not {_told(schema[word])}")

    def dependents(self, schema: dict[str, object], word: str, path: str) -> None:
        value = schema[word]
        if not isinstance(value, dict):
            self.fail(path, f"must be an object, not {_kind(value)}")
        for name, needed in value.items():
            if word == "dependentRequired" or isinstance(needed, list):
                self.names(needed, step(path, name))

    def reference(self, schema: dict[str, object], word: str, path: str) -> None:
        value = schema[word]
        if not isinstance(value, str):
            self.fail(path, f"must be a string, not {_kind(value)}")
        target = self.references.find(value, schema)
        if target is None:
            other = "" if value.startswith("#") else "other documents are not fetched: "
            remedy = f"{other}put the schema into $defs and refer to #/$defs/NAME"
            self.fail(path, f"{shortened(value, 100)!r} leads nowhere; {remedy}")
        self.referring.append((schema, path))
        if id(target.schema) not in self.seen:
            self.pending.append((target.schema, target.path))

    def pattern(self, schema: dict[str, object], word: str, path: str) -> None:
        if not isinstance(schema[word], str):
            self.fail(path, f"must be a string, not {_kind(schema[word])}")
        self.regex(str(schema[word]), path)

    def regex(self, pattern: str, path: str) -> None:
        reason = patterns.wrong(pattern)
        if reason is not None:
            self.fail(path, f"{shortened(pattern, 80)!r} is no regular expression: {reason}")


_OTHERS: Final[dict[str, Callable[[_Walk, dict[str, object], str, str], None]]] = {
    "type": _Walk.type,
    "enum": _Walk.enum,
    "required": _Walk.required,
    "items": _Walk.items,
    "uniqueItems": _Walk.unique,
    "dependencies": _Walk.dependents,
    "dependentRequired": _Walk.dependents,
    "$ref": _Walk.reference,
    "pattern": _Walk.pattern,
}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "this")


def _told(value: object) -> str:
    if isinstance(value, list | dict) or value is None or isinstance(value, bool):
        return _kind(value)
    return shortened(compact(value))
