"""`restore`: an answer to an adapted schema as one to the original; `NullFilter`: the same of its text as it comes.

The gateway calls them where `schemas.needs_restoring` says so. Knows no vendor: what is undone is JSON Schema's own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from diptych.protos.wire_checks import JsonObject, compact

from .schema_documents import MAX_BRANCHES, Document, Inexpressible, type_of, types_of, values_of

_MAX_STEPS = 200_000  # of schemas looked at: alternatives within alternatives multiply
_MAX_TELLING_CHARS = 256  # of a text that tells which of several objects one is
_STRING_END = re.compile(r"[\"\\]")
_SPACE = " \t\r\n"


def restore(value: Any, schema: JsonObject) -> Any:
    """`value`, parsed, without the nulls that stand for absent optional properties of `schema`, the original. Nothing
    else is changed, and nothing at all where `value` does not fit `schema` even so. Never raises.
    """
    try:
        return _Shapes(schema).restored(value, schema)
    except (Inexpressible, _TooMuch, RecursionError):
        return value


class _TooMuch(Exception):
    """A schema has too many alternatives to look at them all."""


class _Shapes:
    """What values look like by a schema."""

    def __init__(self, root: JsonObject) -> None:
        self._document = Document(root)
        self._steps = 0

    def restored(self, value: Any, schema: object) -> Any:
        flat = self._flat(schema)
        if "anyOf" in flat:
            branch = next((branch for branch in self._branches(flat) if self.fits(value, branch)), None)
            return value if branch is None else self.restored(value, branch)
        if isinstance(value, list):
            return [self.restored(entry, of_place(flat, i)) for i, entry in enumerate(value)]
        if not isinstance(value, dict):
            return value
        found = {}
        for name, inner in value.items():
            if inner is not None or not self.stands_for_nothing(flat, name):
                found[name] = self.restored(inner, of_name(flat, name))
        return found

    def fits(self, value: Any, schema: object) -> bool:
        """Whether `value` has the shape of `schema`: types, values and names; ranges and the like choose nothing."""
        try:
            flat = self._flat(schema)
        except Inexpressible:
            return False
        if "anyOf" in flat:
            return any(self.fits(value, branch) for branch in self._branches(flat))
        kind, types, values = type_of(value), types_of(flat), values_of(flat)
        if types and kind not in types and not (kind == "integer" and "number" in types):
            return False
        if values is not None and compact(value) not in map(compact, values):
            return False
        if isinstance(value, list):
            return all(self.fits(entry, of_place(flat, i)) for i, entry in enumerate(value))
        if not isinstance(value, dict):
            return True
        there = {k: v for k, v in value.items() if v is not None or not self.stands_for_nothing(flat, k)}
        if any(name not in there for name in flat.get("required", ())):
            return False
        return all(self.fits(inner, of_name(flat, name)) for name, inner in there.items())

    def stands_for_nothing(self, flat: JsonObject, name: str) -> bool:
        """Whether a null of this name does: of an optional property that can be none itself."""
        if name in flat.get("required", ()) or name not in flat.get("properties", {}):
            return False
        return not self.fits(None, flat["properties"][name])

    def options(self, schema: object) -> list[JsonObject]:
        """The flat schemas without alternatives of which a value fits one."""
        try:
            flat = self._flat(schema)
        except Inexpressible:
            return []
        if "anyOf" not in flat:
            return [flat]
        return [option for branch in self._branches(flat) for option in self.options(branch)][:MAX_BRANCHES]

    @staticmethod
    def _branches(flat: JsonObject) -> list[object]:
        around = {key: inner for key, inner in flat.items() if key != "anyOf"}
        return [{"allOf": [branch, around]} for branch in flat["anyOf"]]

    def _flat(self, schema: object) -> JsonObject:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise _TooMuch
        return self._document.flat(schema, "", keeps=False, follows=True)


def of_place(flat: JsonObject, i: int) -> object:
    """The schema of a list's item."""
    items, first = flat.get("items", True), flat.get("prefixItems", [])
    if isinstance(items, list):
        items, first = flat.get("additionalItems", True), items
    return first[i] if i < len(first) else items


def of_name(flat: JsonObject, name: str) -> object:
    """The schema of an object's property."""
    return flat.get("properties", {}).get(name, flat.get("additionalProperties", True))


@dataclass(slots=True)
class _Level:
    """An object or a list that has begun. `flats`: what it may be; `num_told`: members that went on."""

    is_object: bool
    flats: list[JsonObject]
    name: str = ""
    index: int = 0
    num_told: int = 0


class NullFilter:
    """The text of one answer, in pieces, without the members that `restore` would take out. Which of several objects
    one is, is known from what was said of it before: where that leaves a doubt, a null stays. What is no JSON goes
    through as it is.
    """

    def __init__(self, schema: JsonObject) -> None:
        self._shapes = _Shapes(schema)
        self._root = schema
        self._levels: list[_Level] = []
        self._mode: Literal["value", "first", "name", "colon", "string", "literal", "after", "over"] = "value"
        self._token = ""  # the text or the literal that is being read
        self._is_name = False
        self._is_escaped = False
        self._held: list[str] | None = None  # a member's name and what stands around it, until its value begins
        self._out: list[str] = []

    def feed(self, text: str) -> str:
        """What may go on now. No more is held than one name and the letters of a null."""
        at = 0
        try:
            while at < len(text) and self._mode != "over":
                at = self._string(text, at) if self._mode == "string" else self._step(text, at)
        except (_TooMuch, RecursionError):
            self._mode = "over"
        if self._mode == "over":
            self._out += [*(self._held or ()), text[at:]]
            self._held = None
        out, self._out = self._out, []
        return "".join(out)

    def end(self) -> str:
        """What was held when the text was cut off."""
        held, self._held = self._held or [], None
        return "".join(held)

    def _pass(self, text: str) -> None:
        (self._out if self._held is None else self._held).append(text)

    def _release(self) -> None:
        """The member is told."""
        held, self._held = self._held, None
        if held is None:
            return
        level = self._levels[-1]
        if level.num_told == 0 and held and held[0] == ",":
            held = held[1:]
        level.num_told += 1
        self._out += held

    def _string(self, text: str, at: int) -> int:
        if self._is_escaped:
            end = at + 1
            self._is_escaped = False
        else:
            found = _STRING_END.search(text, at)
            end = len(text) if found is None else found.end()
            self._is_escaped = found is not None and found[0] == "\\"
            if found is not None and found[0] == '"':
                self._mode = "colon" if self._is_name else "after"
        if len(self._token) <= _MAX_TELLING_CHARS or self._is_name:
            self._token += text[at:end]
        self._pass(text[at:end])
        if self._mode == "colon":
            self._levels[-1].name = str(_value(self._token))
        elif self._mode == "after":
            self._learn()
        return end

    def _step(self, text: str, at: int) -> int:
        """The next letter, which is in no string. Where it is."""
        letter = text[at]
        if self._mode == "literal":
            if letter.isalnum() or letter in "+-.":
                self._token += letter
                self._pass(letter)
                return at + 1
            self._literal()
            return at
        if letter in _SPACE:
            self._pass(letter)
        elif self._mode in ("value", "first") and not (self._mode == "first" and letter in "]}"):
            self._begin(letter)
        elif self._mode == "colon" and letter == ":":
            self._pass(letter)
            self._mode = "value"
        elif self._mode == "name" and letter == '"':
            self._text(letter, is_name=True)
        elif self._mode in ("after", "first") and self._levels:
            self._between(letter)
        else:
            self._mode = "over"
            return at
        return at + 1

    def _begin(self, letter: str) -> None:
        """A value, or, where an object has just begun, a name."""
        if self._mode == "first" and self._levels[-1].is_object:
            self._mode = "over" if letter != '"' else self._mode
            self._text(letter, is_name=True) if letter == '"' else self._pass(letter)
            return
        if letter == "n":
            self._token, self._mode = letter, "literal"
            self._pass(letter)
            return
        self._release()
        if letter == '"':
            self._text(letter, is_name=False)
        elif letter in "{[":
            self._levels.append(_Level(letter == "{", self._flats("object" if letter == "{" else "array")))
            self._pass(letter)
            self._mode = "first"
            self._held = [] if letter == "{" else None
        else:
            self._token, self._mode = letter, "literal"
            self._pass(letter)

    def _text(self, letter: str, *, is_name: bool) -> None:
        self._token, self._is_name, self._mode = letter, is_name, "string"
        self._pass(letter)

    def _between(self, letter: str) -> None:
        """A comma or a bracket."""
        level = self._levels[-1]
        if letter == ",":
            self._held = [] if level.is_object else None
            self._pass(letter)
            level.index += 1
            self._mode = "name" if level.is_object else "value"
            return
        self._out += self._held or []
        self._held = None
        self._out.append(letter)
        if letter != ("}" if level.is_object else "]"):
            self._mode = "over"
            return
        self._levels.pop()
        self._mode = "after" if self._levels else "over"

    def _literal(self) -> None:
        """A number, true, false or null has ended."""
        self._mode = "after"
        level = self._levels[-1] if self._levels else None
        if self._token != "null" or level is None or not level.is_object:
            self._release()
            self._learn()
            return
        known = [flat for flat in level.flats if level.name in flat.get("properties", {})]
        if known and all(self._shapes.stands_for_nothing(flat, level.name) for flat in known):
            self._held = None
        else:
            self._release()
            self._learn()

    def _learn(self) -> None:
        """What the value of a member says of the object that has it."""
        level = self._levels[-1] if self._levels else None
        if level is None or not level.is_object or len(level.flats) < 2 or len(self._token) > _MAX_TELLING_CHARS:
            return
        value = _value(self._token)
        fit = [flat for flat in level.flats if self._shapes.fits(value, of_name(flat, level.name))]
        level.flats = fit or level.flats

    def _flats(self, kind: str) -> list[JsonObject]:
        if not self._levels:
            places: list[object] = [self._root]
        else:
            level = self._levels[-1]
            places = [of_name(f, level.name) if level.is_object else of_place(f, level.index) for f in level.flats]
        found = [flat for place in places for flat in self._shapes.options(place)]
        return [flat for flat in found if kind in (types_of(flat) or [kind])][:MAX_BRANCHES]


def _value(token: str) -> object:
    try:
        return json.loads(token)
    except ValueError:
        return token
