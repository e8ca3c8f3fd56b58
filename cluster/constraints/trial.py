"""Tries grammars with llguidance in the router's own process: whether it takes one, why not, and how long it may think.

`schema`, `patterns` and `lark` call it before an engine sees a grammar. It works on bytes: no vocabulary is needed to
know whether a grammar compiles.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Final

import llguidance

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# One space at most after `:` and `,`: models write better JSON with it, and no run of blanks can fill an answer.
OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_flexible": False,
    "key_separator": ": ?",
    "item_separator": ", ?",
    # Without \\uXXXX: a name spelled with it would pass for another one, and its own rule not be applied.
    "json_allowed_escapes": 'nrbtf\\"',
}


PROBE_BYTES: Final = 16

_BYTES: Final = (1 << 256) - 1
_PRINTABLE: Final = (1 << 127) - (1 << 0x23)  # without the quote
_BRACE: Final = 1 << ord("{")
_LETTERS: Final = (1 << 0x7B) - (1 << 0x61)

Matcher = llguidance.LLMatcher


def json_text(value: object) -> str:
    """Compact JSON with the keys in their order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def limits() -> llguidance.LLParserLimits:
    """What a grammar may cost. On 2 cores of a 2.x GHz server the worst hostile grammar of the tests ends in 0.2 s."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_items_in_row=2_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


@cache
def tokenizer() -> llguidance.LLTokenizer:
    """256 tokens of one byte each, and one end token."""
    return llguidance.LLTokenizer("byte")


def matcher(grammar: str) -> llguidance.LLMatcher:
    """A matcher of bytes; ask its `is_error` before use."""
    return llguidance.LLMatcher(tokenizer(), grammar, log_level=0, limits=limits())


def refusal(grammar: str) -> str | None:
    """Why llguidance does not take a grammar, or None.

    The first bytes of two answers are tried as well: an engine meets some bounds only there, when it is too late.
    """
    compiled = matcher(grammar)
    if compiled.is_error():
        return compiled.get_error()
    for favourites in (_LETTERS, _PRINTABLE):
        tried = compiled.deep_copy()
        _walk(tried, favourites)
        if tried.is_error():
            return tried.get_error()
    return None


def _walk(tried: Matcher, favourites: int) -> None:
    """Go on with the lowest of the bytes that may come: first a brace, then one of the favourites, where one may."""
    wanted = _BRACE
    for _ in range(PROBE_BYTES):
        mask = int.from_bytes(tried.compute_bitmask(), "little") & _BYTES
        mask = mask & wanted or mask & favourites or mask
        wanted = 0
        if not mask or not tried.consume_token((mask & -mask).bit_length() - 1):
            return


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text is an answer by the grammar. A grammar that does not compile accepts nothing."""
    tried = matcher(grammar)
    data = list(text.encode())
    return not tried.is_error() and tried.try_consume_tokens(data) == len(data) and tried.is_accepting()


def json_grammar(schema: object) -> str:
    """The grammar of a schema in llguidance's JSON form, with our whitespace. Does not check it."""
    if isinstance(schema, bool):
        schema = {} if schema else {"allOf": [False]}
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=OPTIONS)


def regex_grammar(pattern: str) -> str:
    """The grammar of a regular expression that the whole answer matches."""
    return llguidance.LLMatcher.grammar_from_regex(pattern)
