"""Text in llguidance's dialect of Lark: pieces for `tool_calls`, and the check of a client's own grammar.

A client's grammar may say any text and no token: what would name tokens, or change how the engine samples, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, NoReturn

from llguidance.gbnf_to_lark import gbnf_to_lark

from diptych.cluster.constraints import trial
from diptych.cluster.constraints.paths import shortened
from diptych.protos.errors import InvalidRequest

MAX_TEXT_BYTES: Final = 64 << 10  # of a client's grammar or pattern
MAX_BRACKETS: Final = 200  # open at once

_TOKEN: Final = re.compile(
    r"""
    (?P<blank> \s+ | (?://|\#)[^\n]* )
  | (?P<string> "(?:\\.|[^"\\\n])*"i? )
  | (?P<regex> /(?![/*\s])(?:\\.|[^/\\\n])+/[imslux]* )
  | (?P<special> <[^<>\s]*> | @[A-Za-z_]\w* )
  | (?P<directive> %[a-z]+ )
  | (?P<attributes> (?<=\w)\[[^\]\n]*\] )
  | (?P<word> [A-Za-z_][\w-]* )
  | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_REFUSED_ATTRIBUTES: Final = re.compile(r"\b(stop|max_tokens|temperature)\b")
_DIRECTIVES: Final = frozenset(["%ignore", "%import", "%json", "%regex"])
_GBNF: Final = re.compile(r"^\s*[A-Za-z_][\w-]*\s*::=", re.MULTILINE)
_NO_TEXT: Final = "NoExtensionBias"  # llguidance's words
_NO_START: Final = "no start rule found"
_PLACE: Final = re.compile(r"(?:at )?(\d+)\((\d+)\): ")


def quoted(text: str) -> str:
    """A literal of this text."""
    return json.dumps(text, ensure_ascii=False)


def literal(text: str, token_ids: Mapping[str, int]) -> str:
    """A sequence that says this text: markers that are tokens of the model as these tokens, the rest as characters."""
    marks = sorted((mark for mark in token_ids if mark and mark in text), key=len, reverse=True)
    if not marks:
        return quoted(text) if text else ""
    pieces = re.split("(" + "|".join(re.escape(mark) for mark in marks) + ")", text)
    return " ".join(f"<[{token_ids[p]}]>" if p in token_ids else quoted(p) for p in pieces if p)


def json_value(schema: object) -> str:
    """A JSON value by a schema in the reduced form, with our whitespace."""
    fields = schema if isinstance(schema, dict) else {} if schema is True else {"allOf": [False]}
    return "%json " + trial.json_text({"x-guidance": dict(trial.OPTIONS), **fields})


def without(texts: list[str], least: str = "*") -> str:
    """A terminal of any text in which none of these occurs; `least` is `*` or `+`."""
    free = f"/(?s:.{least})/"
    if not texts:
        return free
    return f"{free} & ~/(?s:.*)(?:{'|'.join(regex_escaped(text) for text in texts)})(?s:.*)/"


def regex_escaped(text: str) -> str:
    """A pattern, to stand in `/.../`, of just this text."""
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character.isalnum() or character in " _" or ord(character) > 0x9F:
        return character
    return f"\\x{ord(character):02x}"


def checked(text: str, where: str) -> str:
    """A client's grammar, in Lark or in GBNF (`root ::= ...`), as Lark that compiles.

    Raises InvalidRequest naming line and column: it does not parse, names tokens, or is too large.
    """
    if not text.strip():
        raise InvalidRequest(f"{where}: is empty", where)
    _bounded(text, where)
    if text.lstrip().startswith("{"):
        # llguidance reads such a text as its JSON form, in which a grammar may name tokens.
        _fail(text, len(text) - len(text.lstrip()), "a grammar begins with a rule, such as start: ...", where)
    if _GBNF.search(text):
        text = _from_gbnf(text, where)
    else:
        _scan(text, where)
    refusal = trial.refusal(text)
    if refusal is not None:
        raise InvalidRequest(f"{where}: {_located(refusal)}", where)
    return text


def checked_regex(pattern: str, where: str) -> str:
    """The grammar of a pattern that the whole answer matches. Raises InvalidRequest: what llguidance does not know."""
    _bounded(pattern, where)
    grammar = trial.regex_grammar(pattern)
    refusal = trial.refusal(grammar)
    if refusal is not None:
        if refusal.startswith(_NO_TEXT):
            raise InvalidRequest(f"{where}: no text matches this pattern", where)
        reason = refusal.rsplit("error:", 1)[-1] if "error:" in refusal else refusal
        hint = "; patterns have the syntax of Rust's regex: no lookarounds, no \\b, no back-references"
        raise InvalidRequest(f"{where}: {shortened(' '.join(reason.split()), 200)}{hint}", where)
    return grammar


def _bounded(text: str, where: str) -> None:
    if len(text.encode(errors="surrogatepass")) > MAX_TEXT_BYTES:
        raise InvalidRequest(f"{where}: more than {MAX_TEXT_BYTES} bytes", where)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequest(f"{where}: holds half of a character (a lone surrogate)", where)
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_BRACKETS:
            _fail(text, position, f"more than {MAX_BRACKETS} brackets are open", where)
        depth = max(depth, 0)


def _from_gbnf(text: str, where: str) -> str:
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise InvalidRequest(f"{where}: nests too deep", where) from None
    except Exception as error:  # the converter raises plain Exception, and IndexError at a text's end
        told = shortened(str(error), 200) or "ends too early"
        raise InvalidRequest(f"{where}: cannot be read as GBNF: {told}", where) from error


def _scan(text: str, where: str) -> None:
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        assert found is not None, "one branch takes any character"
        kind, token = found.lastgroup, found.group()
        if kind == "special":
            _fail(text, position, f"{shortened(token)} names a token or a grammar; write text in quotes", where)
        if kind == "attributes" and _REFUSED_ATTRIBUTES.search(token):
            _fail(text, position, f"{shortened(token)}: stop, max_tokens and temperature belong to the request", where)
        position = found.end()
        if kind == "directive":
            position = _directive(text, position, token, where)


def _directive(text: str, position: int, token: str, where: str) -> int:
    if token not in _DIRECTIVES:
        known = ", ".join(sorted(_DIRECTIVES))
        _fail(text, position, f"{token} is not taken; known here are {known}", where)
    if token == "%import" and not re.match(r"\s+common\.", text[position:]):
        _fail(text, position, "only %import common.NAME is known", where)
    if token not in ("%json", "%regex"):
        return position
    start = position + len(text[position:]) - len(text[position:].lstrip())
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        _fail(text, start, f"{token} wants a JSON object: {shortened(str(error), 120)}", where)
    return end


def _fail(text: str, position: int, message: str, where: str) -> NoReturn:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    raise InvalidRequest(f"{where}: line {line}, column {column}: {message}", where)


def _located(refusal: str) -> str:
    if refusal.startswith(_NO_TEXT):
        return "no text matches this grammar: each way through its rules comes back to where it began"
    if refusal.startswith(_NO_START):
        return "has no rule named start, with which answers begin: start: ..."
    place = _PLACE.match(refusal)
    first = refusal[place.end() :] if place else refusal
    reason = shortened(" ".join(first.split("\n", 1)[0].split()), 300)
    return f"line {place[1]}, column {place[2]}: {reason}" if place else reason
