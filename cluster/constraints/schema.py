"""Judges a client's schema: refused, or what the grammar is, what it covers, and which engine is to follow it.

`compose` calls it for answers and for the arguments of tools. First what is no schema is refused (`check`), then it is
reduced to what llguidance follows (`rewrite`) and tried; what it cannot take even when told less goes to xgrammar.
Verdicts are kept, so that a schema sent with every request costs its hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from diptych.cluster.constraints import trial
from diptych.cluster.constraints.burden import MAX_MET, patterns_met
from diptych.cluster.constraints.check import MAX_NESTING, MAX_SCHEMA_BYTES, Checked, check, compact, nesting
from diptych.cluster.constraints.kept import Newest, key_of
from diptych.cluster.constraints.paths import joined
from diptych.cluster.constraints.references import part_path, parts
from diptych.cluster.constraints.rewrite import Note, reduced
from diptych.protos.errors import InvalidRequest

__all__ = ["MAX_SCHEMA_BYTES", "Judged", "Note", "Verdicts", "judge"]

Backend = Literal["llguidance", "xgrammar"]
Coverage = Literal["full", "partial"]

_UNSATISFIABLE: Final = "Unsatisfiable schema"
_MAX_EMPTY_DEFINITIONS: Final = 16
# What is left out, in this order, of a schema that llguidance does not take as it is.
_RELAXED: Final = (("multipleOf",), ("patternProperties",), ("minProperties", "maxProperties"), ("pattern", "format"))
_PATTERNS: Final = _RELAXED[-1]


@dataclass(frozen=True, slots=True)
class Judged:
    """A schema that answers can be held to.

    `schema` goes to the engine: reduced for llguidance, as the client wrote it for xgrammar. Coverage is "full" when
    whatever the grammar allows matches the client's schema; otherwise `notes` name what only the check afterwards sees.
    `ignored` are paths of words without a meaning in JSON Schema. Paths begin at the schema itself.
    """

    schema: object
    backend: Backend
    notes: tuple[Note, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def coverage(self) -> Coverage:
        """Whether the grammar says all that the schema says."""
        return "partial" if self.notes else "full"

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about."""
        return 4 * len(compact(self.schema)) + 200 * (len(self.notes) + len(self.ignored) + 4)


Verdicts = Newest[Judged]

_VERDICTS: Final = Verdicts(max_count=1024, max_bytes=32 << 20)


def judge(schema: object, where: str = "", verdicts: Verdicts = _VERDICTS) -> Judged:
    """What an answer can be held to; `where` is the request's field, for messages.

    The schema is a JSON value. Raises InvalidRequest naming the place in it: no schema, too large, or no value matches.
    """
    if nesting(schema) > MAX_NESTING:
        check(schema, where)
    # The order of members counts: answers follow it.
    key = key_of(compact(schema))
    found = verdicts.get(key)
    if found is None:
        found = _judged(check(schema, where), where)
        verdicts.put(key, found, found.size_bytes)
    return found


def _judged(checked: Checked, where: str) -> Judged:
    made = reduced(checked)
    schema, notes = made.schema, list(made.notes)
    refusal: str | None = None
    rungs = ((), *_RELAXED) if patterns_met(schema) <= MAX_MET else (_PATTERNS, *_RELAXED[:-1])
    for leave_out in rungs:
        if leave_out:
            places = _places(checked.schema, leave_out)
            if not places:
                continue
            notes += [Note(word, path, "llguidance does not take it together with the rest") for word, path in places]
            schema = _without(schema, leave_out)
        schema, refusal = _without_empty(schema)
        if refusal is None:
            return Judged(schema, "llguidance", tuple(dict.fromkeys(notes)), checked.ignored)
        if refusal.startswith(_UNSATISFIABLE):
            path = joined(where, "")
            raise InvalidRequest(f"{path or 'the schema'}: no value can match it ({_plain(refusal)})", path or None)
    why = f"followed by xgrammar, which does not promise every keyword: llguidance says {_plain(refusal)!r}"
    return Judged(checked.schema, "xgrammar", (*made.notes, Note("", "", why)), checked.ignored)


def _without_empty(schema: object) -> tuple[object, str | None]:
    """The schema without references to definitions that nothing can match, and why llguidance does not take it."""
    for _ in range(_MAX_EMPTY_DEFINITIONS):
        refusal = trial.refusal(trial.json_grammar(schema))
        if refusal is None or not refusal.startswith(_UNSATISFIABLE) or "#/$defs/" not in refusal:
            return schema, refusal
        name = refusal.rsplit("#/$defs/", 1)[1].split()[0]
        schema = _replaced(schema, {"$ref": f"#/$defs/{name}"})
    return schema, refusal


def _replaced(value: object, reference: object) -> object:
    if value == reference:
        return False
    if isinstance(value, dict):
        literal = ("const", "enum")
        return {word: inner if word in literal else _replaced(inner, reference) for word, inner in value.items()}
    return [_replaced(inner, reference) for inner in value] if isinstance(value, list) else value


def _without(schema: object, words: tuple[str, ...]) -> object:
    """The reduced schema without some keywords, no narrower."""
    if isinstance(schema, list):
        return [_without(inner, words) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, object] = {}
    for word, value in schema.items():
        if word in words:
            continue
        if word in ("properties", "patternProperties", "$defs") and isinstance(value, dict):
            made[word] = {name: _without(inner, words) for name, inner in value.items()}
        elif word in ("const", "enum", "required"):
            made[word] = value
        else:
            made[word] = _without(value, words)
    if "patternProperties" in words and "patternProperties" in schema and "additionalProperties" in made:
        made["additionalProperties"] = True
    return made


def _places(schema: object, words: tuple[str, ...], path: str = "") -> list[tuple[str, str]]:
    if not isinstance(schema, dict):
        return []
    found = [(word, part_path(path, word, None)) for word in words if word in schema]
    for word, key, part in parts(schema):
        found += _places(part, words, part_path(path, word, key))
    return found


def _plain(refusal: str | None) -> str:
    return " ".join((refusal or "").split()[:24]).removeprefix(f"{_UNSATISFIABLE}: ")
