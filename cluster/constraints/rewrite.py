"""A checked schema in the reduced form that llguidance follows; what cannot be kept is noted.

The reduced form has draft 2020-12's meaning and the words type, const, enum, bounds, pattern, format, properties,
patternProperties, additionalProperties, required, items, prefixItems, anyOf, allOf and `$ref` into `$defs`. Every step
is exact or noted: answers may be wider than the schema at a note's place, never narrower. `objects` has what belongs to
objects; `schema` tries the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from diptych.cluster.constraints import formats, objects, patterns
from diptych.cluster.constraints.check import MAX_COUNT, Checked
from diptych.cluster.constraints.disjoint import disjoint, type_of
from diptych.cluster.constraints.keywords import Draft
from diptych.cluster.constraints.negate import negated
from diptych.cluster.constraints.paths import step

MAX_PARTS: Final = 20_000  # schemas that rewriting may make
MAX_EXCLUSIONS: Final = 400  # alternatives that keep the branches of one oneOf apart

_KEPT: Final = frozenset(["type", "const", "enum", "required"])
_FIRST: Final = ("type", "const", "enum", "properties", "patternProperties", "additionalProperties", "required")


@dataclass(frozen=True, slots=True)
class Note:
    """What the grammar does not enforce: the keyword, its path in the schema, and why."""

    keyword: str
    path: str
    why: str


@dataclass(frozen=True, slots=True)
class Reduced:
    """A schema in the reduced form, and what it says less than the original."""

    schema: object
    notes: tuple[Note, ...]


def reduced(checked: Checked) -> Reduced:
    """The schema in the form that llguidance follows. Never raises."""
    rewriter = Rewriter(checked)
    root = rewriter.node(checked.schema, "")
    rewriter.settle()
    definitions = rewriter.definitions()
    if isinstance(root, dict) and definitions:
        root = {**root, "$defs": definitions}
    return Reduced(root, tuple(dict.fromkeys(rewriter.notes)))


@dataclass(slots=True)
class Rewriter:
    """One schema on its way. Conditions that need to know all definitions wait until `settle`."""

    checked: Checked
    notes: list[Note] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)
    _definitions: dict[str, object] = field(default_factory=dict)
    _waiting: dict[int, Callable[[], None]] = field(default_factory=dict)
    _kept_alive: list[object] = field(default_factory=list)
    _parts: int = 0

    def note(self, keyword: str, path: str, why: str) -> None:
        """Something is left to the check after the answer."""
        self.notes.append(Note(keyword, step(path, keyword), why))

    def node(self, schema: object, path: str) -> object:
        """One schema and all inside of it."""
        self._parts += 1
        if not isinstance(schema, dict):
            return schema is not False
        if "$ref" in schema and self.checked.draft.ref_hides_siblings:
            return self.reference(schema)
        core: dict[str, object] = {}
        after: list[object] = []
        self._strings(schema, path, core, after)
        self._numbers(schema, path, core)
        self._arrays(schema, path, core)
        after += objects.objects(self, schema, path, core)
        for word in _KEPT & schema.keys():
            if word in ("const", "enum") and not _holds_exact(schema[word]):
                self.note(word, path, "holds a number with more digits than a grammar's numbers")
                values = [schema[word]] if word == "const" else _list(schema[word])
                core.setdefault("type", list(dict.fromkeys(type_of(value) for value in values)))
            else:
                core[word] = schema[word]
        before = self._conjunctions(schema, path, core, after)
        self._alternatives(schema, path, core, after)
        return _assembled(before, core, after)

    def look(self, schema: object) -> object:
        """See `disjoint.Library`."""
        for _ in range(len(self._definitions) + 1):
            if not isinstance(schema, dict):
                return schema
            if id(schema) in self._waiting:
                self._waiting.pop(id(schema))()
            if _PENDING in schema:
                return True
            if set(schema) != {"$ref"}:
                return schema
            schema = self._definitions.get(str(schema["$ref"]).removeprefix("#/$defs/"), True)
        return True  # references in a circle

    def definitions(self) -> dict[str, object]:
        """See `disjoint.Library`."""
        return self._definitions

    def settle(self) -> None:
        """Decide what had to wait."""
        while self._waiting:
            self._waiting.pop(next(iter(self._waiting)))()

    def reference(self, schema: dict[str, object]) -> object:
        """A `$ref`, its target under a name of ours."""
        target = self.checked.references.find(str(schema["$ref"]), schema)
        assert target is not None, "check lets no reference pass that leads nowhere"
        if isinstance(target.schema, bool):
            return target.schema
        name = self._names.get(id(target.schema))
        if name is None:
            name = self._names[id(target.schema)] = f"d{len(self._names)}"
            self._definitions[name] = {_PENDING: True}
            self._definitions[name] = self.node(target.schema, target.path)
        return {"$ref": f"#/$defs/{name}"}

    def _strings(self, schema: dict[str, object], path: str, core: dict[str, object], after: list[object]) -> None:
        _counts(schema, core, "minLength", "maxLength")
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            if patterns.followed(pattern):
                core["pattern"] = pattern
            else:
                self.note(
                    "pattern", path, "has lookarounds, back-references or other parts that grammars cannot follow"
                )
        name = schema.get("format")
        if not isinstance(name, str):
            return
        if name in formats.SCHEMAS:
            # Beside a pattern or a bound of the schema's own it must not replace those.
            after.append(formats.SCHEMAS[name])
        elif name in formats.BUILT_IN:
            core["format"] = name
        elif name in formats.UNFOLLOWED and self.checked.draft is not Draft.DRAFT_4:
            self.note("format", path, f"{name} is checked after the answer")

    def _numbers(self, schema: dict[str, object], path: str, core: dict[str, object]) -> None:
        for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
            value = schema.get(word)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if isinstance(value, int) and not _is_exact(value):
                self.note(word, path, "has more digits than a grammar's numbers")
            else:
                core[word] = value
        if self.checked.draft is Draft.DRAFT_4:
            for word, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
                if schema.get(exclusive) is True and word in core:
                    core[exclusive] = core.pop(word)

    def _arrays(self, schema: dict[str, object], path: str, core: dict[str, object]) -> None:
        _counts(schema, core, "minItems", "maxItems")
        prefix, rest = ("prefixItems", "items")
        if isinstance(schema.get("items"), list):
            prefix, rest = "items", "additionalItems"
        firsts = schema.get(prefix)
        if isinstance(firsts, list):
            core["prefixItems"] = [self.node(part, step(step(path, prefix), i)) for i, part in enumerate(firsts)]
        if rest in schema:
            core["items"] = self.node(schema[rest], step(path, rest))
        if schema.get("uniqueItems") is True and _count(core.get("maxItems"), MAX_COUNT) > 1:
            self.note("uniqueItems", path, "a grammar cannot compare the items of a list")
        self._contains(schema, path, core)
        if "unevaluatedItems" in schema and schema["unevaluatedItems"] is not True and "items" not in core:
            if _applies_in_place(schema) or "contains" in schema:
                self.note("unevaluatedItems", path, "depends on which other parts of the schema match")
            else:
                core["items"] = self.node(schema["unevaluatedItems"], step(path, "unevaluatedItems"))

    def _contains(self, schema: dict[str, object], path: str, core: dict[str, object]) -> None:
        if "contains" not in schema:
            return
        least = _count(schema.get("minContains"), 1)
        if least == 0 and "maxContains" not in schema:
            return
        # As many items as must match must be there at all.
        core["minItems"] = max(_count(core.get("minItems"), 0), least)
        wanted = self.node(schema["contains"], step(path, "contains"))
        alone = core.get("maxItems") == core["minItems"] == least and "maxContains" not in schema
        if alone or wanted is True or ("items" in core and core["items"] == wanted):
            if alone:
                core["items"] = {"allOf": [core.get("items", True), wanted]}
            if "maxContains" not in schema and "prefixItems" not in core:
                return
        self.note("contains", path, "a grammar cannot count which items match")

    def _conjunctions(
        self, schema: dict[str, object], path: str, core: dict[str, object], after: list[object]
    ) -> list[object]:
        """`$ref` and `allOf`; what the schema names before its own properties comes before them in an answer too."""
        words = list(schema)
        before: list[object] = []
        for word in ("$ref", "allOf"):
            if word not in schema:
                continue
            parts = schema[word] if word == "allOf" else []
            made = [self.node(part, step(step(path, word), i)) for i, part in enumerate(_list(parts))]
            if word == "$ref":
                made = [self.reference(schema)]
            early = "properties" in schema and words.index(word) < words.index("properties")
            if early:
                before += made
            else:
                after += made
        return before

    def _alternatives(self, schema: dict[str, object], path: str, core: dict[str, object], after: list[object]) -> None:
        made = {
            word: [self.node(part, step(step(path, word), i)) for i, part in enumerate(_list(schema[word]))]
            for word in ("anyOf", "oneOf")
            if word in schema
        }
        if "anyOf" in made:
            after.append({"anyOf": made["anyOf"]})
        context: list[object] = [core, *after]
        if "oneOf" in made:
            after.append(self._later(lambda: self._one_of(context, made["oneOf"], path)))
        if "not" in schema:
            unwanted = self.node(schema["not"], step(path, "not"))
            after.append(self._later(lambda: self._not(unwanted, path)))
        if "if" in schema and ("then" in schema or "else" in schema):
            after.append(self._condition(schema, path))

    def _condition(self, schema: dict[str, object], path: str) -> object:
        test, then, otherwise = (self.node(schema.get(word, True), step(path, word)) for word in ("if", "then", "else"))

        def decide() -> object:
            opposite = self._opposite(test, step(path, "if"))
            if opposite is None:
                self.note("if", path, "its opposite cannot be said by a grammar")
                return True
            return {"anyOf": [{"allOf": [test, then]}, *({"allOf": [part, otherwise]} for part in opposite)]}

        return self._later(decide)

    def _not(self, unwanted: object, path: str) -> object:
        opposite = self._opposite(unwanted, step(path, "not"))
        if opposite is None:
            self.note("not", path, "its opposite cannot be said by a grammar")
            return True
        return {"anyOf": opposite} if opposite else False

    def _one_of(self, context: list[object], branches: list[object], path: str) -> object:
        """`oneOf` as alternatives of which no two can match at once."""
        exclusive: list[list[object]] = [[] for _ in branches]
        made = 0
        for i, first in enumerate(branches):
            for j in range(i):
                if disjoint([*context, first], [*context, branches[j]], self):
                    continue
                inner = step(path, "oneOf")
                without_first, without_second = self._opposite(first, inner), self._opposite(branches[j], inner)
                made += len(without_first or ()) + len(without_second or ())
                if without_first is None or without_second is None or made > MAX_EXCLUSIONS:
                    self.note("oneOf", path, f"branches {j} and {i} may both match one value")
                    return {"anyOf": branches}
                exclusive[i].append({"anyOf": without_second} if without_second else False)
                exclusive[j].append({"anyOf": without_first} if without_first else False)
        return {
            "anyOf": [
                {"allOf": [branch, *others]} if others else branch
                for branch, others in zip(branches, exclusive, strict=True)
            ]
        }

    def noted_below(self, path: str) -> bool:
        """Whether something at this path or inside of it was left out."""
        return any(note.path.startswith(path) for note in self.notes)

    def _opposite(self, schema: object, path: str) -> list[object] | None:
        """What matches just where the schema, made of what is at `path`, does not; None where that cannot be said."""
        before = len(self.notes)
        # What was left out somewhere makes a schema wider, and its opposite too narrow.
        if self._parts > MAX_PARTS or self.noted_below(path) or (before and _refers(schema)):
            return None
        opposite = negated(schema, self)
        self._parts += len(opposite or ())
        return opposite if len(self.notes) == before else None

    def _later(self, decide: Callable[[], object]) -> dict[str, object]:
        place: dict[str, object] = {_PENDING: True}
        self._kept_alive.append(place)

        def settle() -> None:
            made = decide()
            place.clear()
            place.update(made if isinstance(made, dict) else {"allOf": [made]})

        self._waiting[id(place)] = settle
        return place


_PENDING: Final = "?"


def _refers(schema: object) -> bool:
    """Whether a `$ref` occurs in the schema."""
    if isinstance(schema, dict):
        return "$ref" in schema or any(_refers(value) for value in schema.values())
    return isinstance(schema, list) and any(_refers(value) for value in schema)


def _is_exact(value: int) -> bool:
    """Whether llguidance keeps the number as it is: it has floats, and the largest integer of 64 bits rounds well."""
    return abs(value) <= 1 << 63 and (int(float(value)) == value or value == (1 << 63) - 1)


def _holds_exact(value: object) -> bool:
    """The same of all numbers in a value."""
    if isinstance(value, list | dict):
        return all(_holds_exact(part) for part in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or _is_exact(value)


def _assembled(before: list[object], core: dict[str, object], after: list[object]) -> object:
    """One schema of what comes first, the schema's own words, and further conditions."""
    after = [part for part in after if part is not True]
    ordered: dict[str, object] = {word: core[word] for word in _FIRST if word in core}
    ordered |= core
    if before:
        parts = [*before, *([ordered] if ordered else []), *after]
        return parts[0] if len(parts) == 1 else {"allOf": parts}
    if not after:
        return ordered or True
    if len(after) == 1:
        if not ordered:
            return after[0]
        alone = after[0]
        if isinstance(alone, dict) and set(alone) <= {"anyOf", "allOf", "$ref"} and len(alone) == 1:
            return ordered | alone
    return ordered | {"allOf": after}


def _counts(schema: dict[str, object], core: dict[str, object], least: str, most: str) -> None:
    low, high = _count(schema.get(least), 0), _count(schema.get(most), MAX_COUNT + 1)
    if low:
        core[least] = low
    if high <= MAX_COUNT:
        core[most] = high


def _count(value: object, otherwise: int) -> int:
    return int(value) if isinstance(value, int | float) else otherwise


def _applies_in_place(schema: dict[str, object]) -> bool:
    return bool({"allOf", "anyOf", "oneOf", "if", "$ref", "dependentSchemas", "not"} & schema.keys())


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
