"""How many patterns must match one string at once: llguidance's time for that doubles with each, and nothing stops it.

`schema` asks before it tries a schema in the reduced form. The answer may be too high, never too low.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

MAX_MET: Final = 6  # 8 patterns that all match take 4 ms at worst, 12 take 0.2 s, 14 take 2.6 s

_CAP: Final = 1000


@dataclass(frozen=True, slots=True)
class _Load:
    """Patterns that meet at the schema's own value, and at most at any one value inside of it."""

    here: int = 0
    below: int = 0

    def joined(self, other: _Load) -> _Load:
        return _Load(min(self.here + other.here, _CAP), min(self.below + other.below, _CAP))

    def either(self, other: _Load) -> _Load:
        return _Load(max(self.here, other.here), max(self.below, other.below))


def patterns_met(schema: object) -> int:
    """The most patterns and formats that one value may have to match, for a schema in the reduced form."""
    definitions = schema.get("$defs") if isinstance(schema, dict) else None
    load = _Weighing(definitions if isinstance(definitions, dict) else {}).load(schema)
    return max(load.here, load.below)


@dataclass(slots=True)
class _Weighing:
    definitions: dict[str, object]
    known: dict[str, _Load] = field(default_factory=dict)

    def load(self, schema: object) -> _Load:
        if not isinstance(schema, dict):
            return _Load()
        total = _Load(here=("pattern" in schema) + ("format" in schema), below=self._inside(schema))
        if "$ref" in schema:
            total = total.joined(self._definition(str(schema["$ref"])))
        for part in _list(schema.get("allOf")):
            total = total.joined(self.load(part))
        best = _Load()
        for part in _list(schema.get("anyOf")):
            best = best.either(self.load(part))
        return total.joined(best)

    def _inside(self, schema: dict[str, object]) -> int:
        children = [*_list(schema.get("prefixItems")), schema.get("items")]
        named = _values(schema.get("properties"))
        # A name may match its own rule and one of a pattern's.
        others = [*_values(schema.get("patternProperties")), schema.get("additionalProperties")]
        most = self._most([*children, *named, *others])
        return most + self._most(others) if named and "patternProperties" in schema else most

    def _most(self, parts: list[object]) -> int:
        loads = [self.load(part) for part in parts]
        return max((max(load.here, load.below) for load in loads), default=0)

    def _definition(self, reference: str) -> _Load:
        name = reference.removeprefix("#/$defs/")
        if name not in self.known:
            self.known[name] = _Load()  # met again inside of itself it adds nothing new
            self.known[name] = self.load(self.definitions.get(name))
        return self.known[name]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else []
