"""What a schema says of objects, in the reduced form of `rewrite`: members, names, numbers of members, dependencies."""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import TYPE_CHECKING, Final

from diptych.cluster.constraints import patterns, trial
from diptych.cluster.constraints.check import MAX_COUNT
from diptych.cluster.constraints.paths import step

if TYPE_CHECKING:
    from diptych.cluster.constraints.rewrite import Rewriter

_ONE_NAME: Final = re.compile(r"\^([A-Za-z0-9_ -]+)\$")
_MAX_CHOICES: Final = 48
_NO_OBJECT: Final = ("null", "boolean", "number", "string", "array")
_IN_PLACE: Final = frozenset(["allOf", "anyOf", "oneOf", "if", "$ref", "dependentSchemas", "not", "dependencies"])


def objects(rewriter: Rewriter, schema: dict[str, object], path: str, core: dict[str, object]) -> list[object]:
    """Puts the members into `core`; returns further conditions."""
    members = _mapping(schema.get("properties"))
    if "properties" in schema:
        inner = step(path, "properties")
        core["properties"] = {name: rewriter.node(part, step(inner, name)) for name, part in members.items()}
    if "additionalProperties" in schema:
        core["additionalProperties"] = rewriter.node(schema["additionalProperties"], step(path, "additionalProperties"))
    elif schema.get("unevaluatedProperties", True) is not True:
        if _IN_PLACE & schema.keys():
            rewriter.note("unevaluatedProperties", path, "depends on which other parts of the schema match")
        else:
            inner = step(path, "unevaluatedProperties")
            core["additionalProperties"] = rewriter.node(schema["unevaluatedProperties"], inner)
    if "patternProperties" in schema:
        _by_pattern(rewriter, schema, path, core)
    if "propertyNames" in schema:
        _names(rewriter, schema, path, core)
    counted = _numbers_of_members(rewriter, schema, path, core)
    return [*counted, *_dependencies(rewriter, schema, path)]


def _by_pattern(rewriter: Rewriter, schema: dict[str, object], path: str, core: dict[str, object]) -> None:
    inner = step(path, "patternProperties")
    members = dict(_mapping(core.get("properties")))
    groups: dict[str, object] = {}
    left_out = False
    for pattern, part in _mapping(schema["patternProperties"]).items():
        made = rewriter.node(part, step(inner, pattern))
        name = _ONE_NAME.fullmatch(pattern)
        if not patterns.followed(pattern):
            rewriter.note("patternProperties", path, f"{pattern!r} has parts that grammars cannot follow")
            left_out = True
        elif name is not None:
            known = members.get(name[1])
            members[name[1]] = made if known is None else {"allOf": [known, made]}
        else:
            groups[pattern] = made
    if left_out:
        # Names that match what is left out would fall under the rule for all other names.
        core["additionalProperties"] = True
    if not _apart(groups):
        kinds = {trial.json_text(part): part for part in groups.values()}
        if len(kinds) > 1:
            rewriter.note("patternProperties", path, "names that match several patterns are held to one of them only")
        whole = "|".join(f"(?:{pattern})" for pattern in groups)
        groups = {whole: {"anyOf": list(kinds.values())} if len(kinds) > 1 else next(iter(kinds.values()))}
    if members:
        core["properties"] = members
    if groups:
        core["patternProperties"] = groups


def _apart(groups: dict[str, object]) -> bool:
    """Whether llguidance knows that no name matches two of the patterns."""
    if len(groups) < 2:
        return True
    tried = trial.json_grammar({"type": "object", "patternProperties": dict.fromkeys(groups, True)})
    return trial.refusal(tried) is None


def _names(rewriter: Rewriter, schema: dict[str, object], path: str, core: dict[str, object]) -> None:
    """`propertyNames` by what the members may be called."""
    written = rewriter.node(schema["propertyNames"], step(path, "propertyNames"))
    if written is True or written == {}:
        return
    rule = rewriter.look(written)
    members, others = _mapping(core.get("properties")), core.get("additionalProperties", True)
    allowed = _allowed(rule)
    if allowed is None or "patternProperties" in core or rewriter.noted_below(step(path, "propertyNames")):
        rewriter.note("propertyNames", path, "says more of names than one list or one pattern")
        return
    grammar = trial.matcher(trial.json_grammar(rule))
    kept = {name: part for name, part in members.items() if _matches(grammar, name)}
    # Members that are not named by a legal name may not occur: the rule for other names is closed below.
    if isinstance(allowed, list):
        core["properties"] = kept | {name: others for name in allowed if name not in kept}
    else:
        core["properties"] = kept | {name: False for name in members if name not in kept}
        core["patternProperties"] = {allowed: others}
    core["additionalProperties"] = False


def _matches(grammar: trial.Matcher, name: str) -> bool:
    data = list(trial.json_text(name).encode())
    tried = grammar.deep_copy()
    return tried.try_consume_tokens(data) == len(data) and tried.is_accepting()


def _allowed(rule: object) -> list[str] | str | None:
    """The names by a schema of names: a list, a pattern, or None where it is neither."""
    if rule is False:
        return []
    if not isinstance(rule, dict):
        return None
    words = {word: value for word, value in rule.items() if not (word == "type" and value == "string")}
    match sorted(words):
        case ["const"]:
            return [words["const"]] if isinstance(words["const"], str) else []
        case ["enum"]:
            return [name for name in words["enum"] if isinstance(name, str)]
        case ["pattern"]:
            return str(words["pattern"])
        case ["maxLength"] | ["minLength"] | ["maxLength", "minLength"]:
            high = words.get("maxLength", "")
            return f"^[\\s\\S]{{{words.get('minLength', 0)},{high}}}$"
    return None


def _numbers_of_members(
    rewriter: Rewriter, schema: dict[str, object], path: str, core: dict[str, object]
) -> list[object]:
    low, high = _count(schema.get("minProperties"), 0), _count(schema.get("maxProperties"), MAX_COUNT + 1)
    members = _mapping(core.get("properties"))
    possible = {name for name, part in members.items() if part is not False}
    required = {name for name in _list(schema.get("required")) if isinstance(name, str)}
    closed = core.get("additionalProperties", True) is False and "patternProperties" not in core
    if low <= len(required):
        low = 0
    if closed and high >= len(possible | required):
        high = MAX_COUNT + 1
    bounds = {"minProperties": low} if low else {}
    if high <= MAX_COUNT:
        bounds["maxProperties"] = high
    if not bounds:
        return []
    skeleton: dict[str, object] = {
        "type": "object",
        "properties": {name: part is not False for name, part in members.items()},
        "additionalProperties": core.get("additionalProperties", True) is not False,
        "required": sorted(required),
        **bounds,
    }
    if "patternProperties" in core:
        skeleton["patternProperties"] = dict.fromkeys(_mapping(core["patternProperties"]), True)
    if trial.refusal(trial.json_grammar(skeleton)) is None:
        core |= bounds
        if not closed and low > 1:
            rewriter.note("minProperties", path, "a name may be written twice where names are open, and counts once")
        return []
    made: list[object] = []
    named = sorted(possible, key=list(members).index)
    for word, bound in bounds.items():
        choose = _at_least if word == "minProperties" else _at_most
        choices = choose(bound, named, closed=closed)
        if choices is None:
            rewriter.note(word, path, "a grammar can count members only where few of those that are named are optional")
        else:
            made.append({"anyOf": [{"type": list(_NO_OBJECT)}, *choices]})
    return made


def _at_least(bound: int, named: list[str], *, closed: bool) -> list[object] | None:
    """Objects with so many members: those that have some of the named ones, or enough others."""
    if math.comb(len(named), bound) > _MAX_CHOICES or not (closed or bound == 1):
        return None
    choices: list[object] = [{"type": "object", "required": list(some)} for some in combinations(named, bound)]
    if not closed:
        choices.append({"type": "object", "properties": dict.fromkeys(named, False), "minProperties": 1})
    return choices


def _at_most(bound: int, named: list[str], *, closed: bool) -> list[object] | None:
    if not closed or math.comb(len(named), bound) > _MAX_CHOICES:
        return None
    absent = combinations(named, len(named) - bound)
    return [{"type": "object", "properties": dict.fromkeys(some, False)} for some in absent]


def _dependencies(rewriter: Rewriter, schema: dict[str, object], path: str) -> list[object]:
    made: list[object] = []
    for word in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, needed in _mapping(schema.get(word)).items():
            if isinstance(needed, list):
                if not needed:
                    continue
                present: dict[str, object] = {"type": "object", "required": [name, *needed]}
            else:
                inner = step(step(path, word), name)
                present = {"type": "object", "required": [name], "allOf": [rewriter.node(needed, inner)]}
            made.append({"anyOf": [{"properties": {name: False}}, present]})
    return made


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _count(value: object, otherwise: int) -> int:
    return int(value) if isinstance(value, int | float) else otherwise
