"""Regular expressions of schemas: which are none, which the grammar can follow, and complements of lists of strings.

`check` refuses by `wrong`, `rewrite` keeps from the grammar what is not `followed`. Schemas' patterns are ECMA's; two
engines read them: llguidance for the grammar, and for the check after an answer Rust's regex, which is linear, or
fancy-regex for lookarounds and back-references, with bounded steps.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

import jsonschema_rs

from diptych.cluster.constraints import trial

MAX_PATTERN_CHARACTERS: Final = 8192
BACKTRACK_LIMIT: Final = 100_000
REGEX_SIZE_LIMIT: Final = 4 << 20  # bytes of one compiled pattern


_UNIT: Final = re.compile(r"\\[pPux]\{[^{}]*\}|\\.|\{\d+(?:,\d*)?\}|.", re.DOTALL)


def wrong(pattern: str) -> str | None:
    """Why no engine here can read the pattern, or None."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"longer than {MAX_PATTERN_CHARACTERS} characters"
    return _wrong(pattern)


@lru_cache(maxsize=1024)
def _wrong(pattern: str) -> str | None:
    return None if linear(pattern) or _read_with(pattern, backtracking_options()) else _reason(pattern)


@lru_cache(maxsize=1024)
def linear(pattern: str) -> bool:
    """Whether the linear engine reads the pattern; without that it takes one that goes back."""
    return _read_with(pattern, linear_options())


def _read_with(pattern: str, options: jsonschema_rs.RegexOptions | jsonschema_rs.FancyRegexOptions) -> bool:
    try:
        jsonschema_rs.Draft202012Validator({"pattern": pattern}, pattern_options=options, offline=True)
    except ValueError:
        return False
    return True


def _reason(pattern: str) -> str:
    told = trial.refusal(trial.regex_grammar(pattern)) or ""
    last = told.rsplit("error:", 1)[-1].strip().splitlines()
    return last[0] if last and "error:" in told else "it does not parse, or is too large when compiled"


@lru_cache(maxsize=1024)
def followed(pattern: str) -> bool:
    """Whether a grammar can follow the pattern."""
    return trial.refusal(trial.json_grammar({"type": "string", "pattern": pattern})) is None


def portable(pattern: str) -> str:
    """The same pattern with lone braces escaped, as the older drafts' meta-schemas want it and few authors write it."""
    made, position, in_class = [], 0, False
    while position < len(pattern):
        found = _UNIT.match(pattern, position)
        assert found is not None, "one branch takes any character"
        unit = found.group()
        in_class = unit != "]" if in_class else unit == "["
        made.append("\\" + unit if unit in ("{", "}") and not in_class else unit)
        position = found.end()
    return "".join(made)


def linear_options() -> jsonschema_rs.RegexOptions:
    """For patterns that a linear engine can read."""
    return jsonschema_rs.RegexOptions(size_limit=REGEX_SIZE_LIMIT, dfa_size_limit=REGEX_SIZE_LIMIT)


def backtracking_options() -> jsonschema_rs.FancyRegexOptions:
    """For the others: a search that takes more steps than the limit does not match."""
    return jsonschema_rs.FancyRegexOptions(
        backtrack_limit=BACKTRACK_LIMIT, size_limit=REGEX_SIZE_LIMIT, dfa_size_limit=REGEX_SIZE_LIMIT
    )


def literal(text: str) -> str:
    """A pattern of just this text."""
    return f"^{_escaped(text)}$"


Tree = dict[str, "Tree"]  # of texts by their characters; "" where one ends


def none_of(texts: list[str]) -> str:
    """A pattern of every text that is not in the list, as wide as the list's common beginnings."""
    tree: Tree = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return f"^{_outside(tree)}$"


def _outside(tree: Tree) -> str:
    rests = []
    for character, below in tree.items():
        if character:
            rests.append(_escaped(character) + _outside(below))
    firsts = "".join(_in_class(character) for character in tree if character)
    rests.append(f"[^{firsts}][\\s\\S]*" if firsts else "[\\s\\S]+")
    whole = f"(?:{'|'.join(rests)})"
    return whole if "" in tree else f"{whole}?"


def _escaped(text: str) -> str:
    return "".join(_escape(character) if not character.isalnum() else character for character in text)


def _escape(character: str) -> str:
    if character in r"\.+*?()|[]{}^$/-":
        return "\\" + character
    return character if character.isprintable() else f"\\u{ord(character):04x}" if ord(character) < 65536 else character


def _in_class(character: str) -> str:
    return "\\" + character if character in r"\]^-[&~" else _escape(character)
