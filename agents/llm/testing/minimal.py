"""The smallest answer that a JSON schema takes: for models that answer typed calls without a script."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from math import ceil, floor
from typing import Any

JsonObject = dict[str, Any]
_DEEPEST = 24
_FORMATS = {
    "date": "2000-01-01",
    "date-time": "2000-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "PT0S",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "email": "a@example.com",
    "idn-email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "ipvanyaddress": "127.0.0.1",
    "uri": "https://example.com",
    "uri-reference": "https://example.com",
    "json-pointer": "/a",
    "regex": "a",
    "byte": "YQ==",
    "base64url": "YQ==",
    "binary": "a",
    "decimal": "0",
    "path": "a",
    "file-path": "a",
    "directory-path": "a",
    "json-string": "null",
}


class NoMinimal(ValueError):
    """No instance was found; says at which path, and why."""


def minimal_text(schema: JsonObject) -> str:
    """An instance as JSON. Raises NoMinimal; what it gives was validated against the schema."""
    from jsonschema_rs import ValidationError, validator_for

    found = minimal(schema)
    try:
        validator_for(schema).validate(found)
    except (ValidationError, ValueError) as exc:
        raise NoMinimal(f"no minimal answer of this schema is known ({exc}): script the answer") from exc
    return json.dumps(found, ensure_ascii=False)


def minimal(schema: JsonObject) -> Any:
    """An instance: what is optional is left out, lists and texts are as short as they may be; of several kinds, the
    first that can be had. Raises NoMinimal.
    """
    return _Maker(schema).made(schema, "", 0)


class _Maker:
    def __init__(self, root: JsonObject) -> None:
        self._root = root

    def made(self, schema: Any, path: str, depth: int) -> Any:
        if schema is True or schema == {}:
            return "a"
        if not isinstance(schema, dict) or depth > _DEEPEST:
            raise NoMinimal(f"{path or 'the schema'}: {'it never ends' if depth > _DEEPEST else 'nothing fits'}")
        schema = self._plain(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return next(iter(schema["enum"]))
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._first(schema, word, path, depth)
        return self._of_kind(schema, path, depth)

    def _of_kind(self, schema: JsonObject, path: str, depth: int) -> Any:
        kinds = schema.get("type") or (
            "object" if "properties" in schema else "array" if "items" in schema else "string"
        )
        kind = kinds if isinstance(kinds, str) else kinds[0]
        match kind.lower():
            case "object":
                return self._object(schema, path, depth)
            case "array":
                return self._array(schema, path, depth)
            case "string":
                return _string(schema, path)
            case "integer" | "number" as number:
                return _number(schema, number, path)
            case "boolean":
                return False
            case "null":
                return None
            case other:
                raise NoMinimal(f"{path or 'the schema'}: its type is {other!r}")

    def _plain(self, schema: JsonObject) -> JsonObject:
        """Without references, and with the parts of allOf in one."""
        seen = 0
        while "$ref" in schema:
            seen += 1
            if seen > _DEEPEST:
                raise NoMinimal(f"{schema['$ref']}: it refers to itself")
            schema = {**self._named(schema["$ref"]), **{k: v for k, v in schema.items() if k != "$ref"}}
        for part in schema.get("allOf", ()):
            found = self._plain(part)
            properties = {**schema.get("properties", {}), **found.get("properties", {})}
            required = [*schema.get("required", ()), *found.get("required", ())]
            schema = {**found, **schema} | ({"properties": properties} if properties else {})
            schema |= {"required": required} if required else {}
        return schema

    def _named(self, reference: str) -> JsonObject:
        found: Any = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise NoMinimal(f"{reference}: there is no such definition")
        return found

    def _first(self, schema: JsonObject, word: str, path: str, depth: int) -> Any:
        """Of those alternatives that end, the first; recursive ones do not."""
        outer = {name: value for name, value in schema.items() if name not in (word, "title", "default")}
        errors = []
        for inner in schema[word]:
            try:
                merged = {**outer, **self._plain(inner)} if isinstance(inner, dict) else inner
                return self.made(merged, path, depth + 1)
            except NoMinimal as exc:
                errors.append(exc)
        raise errors[0] if errors else NoMinimal(f"{path}: {word} is empty")

    def _object(self, schema: JsonObject, path: str, depth: int) -> JsonObject:
        properties = schema.get("properties", {})
        names = list(
            dict.fromkeys(n for n in (*properties, *schema.get("required", ())) if n in schema.get("required", ()))
        )
        found = {n: self.made(properties.get(n, True), f"{path}/{n}", depth + 1) for n in names}
        lacking = schema.get("minProperties", 0) - len(found)
        more: Iterable[str] = (n for n in properties if n not in found)
        found |= {
            n: self.made(properties[n], f"{path}/{n}", depth + 1) for n, _ in zip(more, range(lacking), strict=False)
        }
        others = schema.get("additionalProperties", True)
        for at in range(schema.get("minProperties", 0) - len(found)):
            found[f"key{at}"] = self.made(others, f"{path}/key{at}", depth + 1)
        return found

    def _array(self, schema: JsonObject, path: str, depth: int) -> list[Any]:
        first = list(schema.get("prefixItems", ()))
        least = schema.get("minItems", 0)
        items = [
            self.made(schema.get("items", True) if at >= len(first) else first[at], f"{path}/{at}", depth + 1)
            for at in range(least)
        ]
        if schema.get("uniqueItems") and len(items) > 1:
            items = _different(items, path)
        return items


def _different(items: list[Any], path: str) -> list[Any]:
    if all(isinstance(item, str) for item in items):
        return [f"{item}{at or ''}" for at, item in enumerate(items)]
    if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items):
        return [item + at for at, item in enumerate(items)]
    raise NoMinimal(f"{path}: several different items are wanted; script the answer")


def _string(schema: JsonObject, path: str) -> str:
    known = _FORMATS.get(schema.get("format", ""))
    if "pattern" in schema and (known is None or re.search(schema["pattern"], known) is None):
        return _matching(schema["pattern"], path, schema.get("minLength", 0))
    if known is not None:
        return known
    return "a" * int(max(schema.get("minLength", 0), min(1, schema.get("maxLength", 1))))


def _number(schema: JsonObject, kind: str, path: str) -> int | float:
    step = schema.get("multipleOf") or (1 if kind == "integer" else None)
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    least = max((v for v in (low, above) if v is not None), default=None)
    most = min((v for v in (high, below) if v is not None), default=None)
    if step is None:
        inner = [v for v in (least, most) if v is not None]
        tried = [
            0,
            least,
            most,
            (sum(inner) / 2 if len(inner) == 2 else inner[0] + 1 if inner else 0),
            *(v - 1 for v in inner),
        ]
    else:
        tried = [0]
        tried += [] if least is None else [ceil(least / step) * step, (floor(least / step) + 1) * step]
        tried += [] if most is None else [floor(most / step) * step, (ceil(most / step) - 1) * step]
    for value in tried:
        if value is None or (low is not None and value < low) or (high is not None and value > high):
            continue
        if (above is not None and value <= above) or (below is not None and value >= below):
            continue
        return int(value) if kind == "integer" else value
    raise NoMinimal(f"{path}: no {kind} lies within its bounds")


def _matching(pattern: str, path: str, least: int) -> str:
    """A short text that the pattern matches. Raises NoMinimal for patterns that look around or back."""
    text = "".join(_Pattern(pattern, path).pieces())
    text += text[-1:] * (least - len(text)) if text else "a" * least
    if re.search(pattern, text) is None:
        raise NoMinimal(f"{path}: no text for the pattern {pattern!r} is known; script the answer")
    return text


_CLASSES = {"d": "0", "w": "a", "s": " ", "D": "a", "W": " ", "S": "a"}


class _Pattern:
    """Reads the common part of regular expressions, and takes the first and least of everything."""

    def __init__(self, pattern: str, path: str) -> None:
        self._left = list(pattern)
        self._path = path
        self._pattern = pattern

    def pieces(self) -> list[str]:
        """Of one alternative, the first; up to the end, or to the parenthesis that closes it."""
        found: list[str] = []
        first: list[str] | None = None
        while self._left and self._left[0] != ")":
            letter = self._left.pop(0)
            if letter == "|":
                first, found = (found if first is None else first), []
                continue
            if letter in "^$":
                continue
            found.append(self._atom(letter) * self._times())
        return found if first is None else first

    def _atom(self, letter: str) -> str:
        if letter == "(":
            return self._group()
        if letter == "[":
            return self._set()
        if letter == ".":
            return "a"
        if letter != "\\":
            return letter
        letter = self._left.pop(0)
        if letter in "bBAZz":
            return ""
        if letter.isdigit():
            raise self._unknown()
        return _CLASSES.get(letter) or {"n": "\n", "t": "\t", "r": "\r"}.get(letter, letter)

    def _group(self) -> str:
        if self._left[:1] == ["?"]:
            del self._left[0]
            while self._left and (letter := self._left.pop(0)) not in ":>":
                if letter in "=!":
                    raise self._unknown()
        text = "".join(self.pieces())
        if not self._left:
            raise self._unknown()
        del self._left[0]
        return text

    def _set(self) -> str:
        is_negated = self._left[:1] == ["^"]
        members: list[str] = []
        while self._left and (self._left[0] != "]" or not members):
            letter = self._left.pop(0)
            members.append(self._atom(letter) if letter == "\\" else letter)
        if not self._left:
            raise self._unknown()
        del self._left[0]
        if not is_negated:
            return members[1] if members[0] == "^" and len(members) > 1 else members[0]
        inside = re.compile(f"[{re.escape(''.join(members))}]")
        return next((letter for letter in "a0 _A-.~" if not inside.match(letter)), "\u00e9")

    def _times(self) -> int:
        if not self._left:
            return 1
        letter, least = self._left[0], 1
        if letter in "*?+":
            del self._left[0]
            least = 1 if letter == "+" else 0
        elif letter == "{" and (told := re.match(r"\{(\d+)(,\d*)?\}", "".join(self._left))):
            del self._left[: told.end()]
            least = int(told[1])
        else:
            return 1
        if self._left[:1] in (["?"], ["+"]):
            del self._left[0]
        return least

    def _unknown(self) -> NoMinimal:
        return NoMinimal(f"{self._path}: no text for the pattern {self._pattern!r} is known; script the answer")
