"""What the echo model writes under grammars of llguidance: the minimal instance of a schema, an end for every pattern,
and its usual words where anything may come.

Guards an answer that never ends: repetitions, white space, numbers that may always go on.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import llguidance
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from diptych.kernels.echo.form import is_free, shortest
from diptych.kernels.echo.runner import EchoRunner
from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.echo import ASSISTANT, END, FIRST_BYTE, NAMES, NUM_WORDS, VOCAB_SIZE
from diptych.protos.errors import DiptychError, InvalidRequest
from diptych.protos.step import LogitRules, SampleSpec, StepPlan, StepRow

PROMPT = (5, 31_999, 7, FIRST_BYTE + 0x30, ASSISTANT)
BLOCK = 16
NUM_BLOCKS = 64
MOST = 200  # tokens


TOKENS = (
    *(f" t{number}".encode() for number in range(NUM_WORDS)),
    *(bytes([byte]) for byte in range(256)),
    *(NAMES[number].encode() for number in range(END, VOCAB_SIZE)),
)


class _Tokens:
    """The echo model's tokens as llguidance wants them: bytes alone are how a text is split."""

    def __init__(self) -> None:
        self.eos_token_id = END
        self.bos_token_id = None
        self.tokens = list(TOKENS)
        self.special_token_ids = list(range(END, VOCAB_SIZE))

    def __call__(self, text: bytes | str) -> list[int]:
        return [FIRST_BYTE + byte for byte in (text.encode() if isinstance(text, str) else text)]


@cache
def tokenizer() -> LLTokenizer:
    return LLTokenizer(llguidance.TokenizerWrapper(_Tokens()), n_vocab=VOCAB_SIZE, eos_token=END)


class LlGuide:
    """constraint.Guide over one matcher; takes what must follow if `forces`."""

    def __init__(self, grammar: str, num_prompt: int, *, forces: bool) -> None:
        self.error: DiptychError | None = None
        self.known: list[int] = []
        self._matcher = LLMatcher(tokenizer(), grammar, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()
        self._num_prompt = num_prompt
        self._forces = forces

    def accept(self, position: int, token: int) -> tuple[int, ...]:
        at = position - self._num_prompt
        if at < len(self.known):
            assert self.known[at] == token
            return ()
        assert at == len(self.known)
        assert self._matcher.consume_token(token), self._matcher.get_error()
        self.known.append(token)
        forced = tuple(self._matcher.compute_ff_tokens()) if self._forces and token != END else ()
        assert self._matcher.consume_tokens(list(forced))
        self.known.extend(forced)
        return forced

    def fill(self, position: int, mask: memoryview) -> None:
        at = position - self._num_prompt
        if at < len(self.known):
            mask[:] = bytes(len(mask))
            mask[self.known[at] // 8] |= 1 << self.known[at] % 8
            return
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask[:] = words[: len(mask)].tobytes()
        if self._matcher.is_error():
            self.error = InvalidRequest(self._matcher.get_error(), "grammar")


def answer(
    grammar: str, *, forces: bool = True, temperature: float = 0.0, most: int = MOST, rules: LogitRules | None = None
) -> list[int]:
    """Tokens until the end, which must come."""
    memory = np.zeros((1, 2, NUM_BLOCKS, 1, BLOCK, 32), np.uint8)
    runner = EchoRunner(memory, max_slots=1, max_step_tokens=512)
    guide = LlGuide(grammar, len(PROMPT), forces=forces)
    tokens, computed = list(PROMPT), 0
    while tokens[-1] != END:
        assert len(tokens) - len(PROMPT) < most, text_of(tokens[len(PROMPT) :])
        spec = SampleSpec(temperature, 1.0, 0, 7, len(tokens), guide=guide, rules=rules)
        row = StepRow(
            slot=0,
            num_tokens=len(tokens) - computed,
            tokens=tuple(tokens[computed:]),
            start=computed,
            blocks=list(range(NUM_BLOCKS)),
            sample=spec,
        )
        runner.launch(StepPlan(1, (row,)))
        result = runner.collect()
        assert result.tokens[0] is not None, guide.error
        computed = len(tokens)
        tokens += [result.tokens[0], *result.forced.get(0, ())]
    return tokens[len(PROMPT) :]


def text_of(tokens: list[int]) -> str:
    assert tokens.count(END) <= 1
    return b"".join(TOKENS[token] for token in tokens if token != END).decode()


def schema(value: dict[str, Any], *, whitespace_flexible: bool) -> str:
    return LLMatcher.grammar_from_json_schema(value, overrides={"whitespace_flexible": whitespace_flexible})


OBJECT = {"type": "object", "additionalProperties": False}
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "integer": ({"type": "integer"}, 0),
    "number": ({"type": "number"}, 0),
    "string": ({"type": "string"}, ""),
    "null": ({"type": "null"}, None),
    "array": ({"type": "array", "items": {"type": "integer"}}, []),
    "min_items": ({"type": "array", "items": {"type": "integer"}, "minItems": 3}, [0, 0, 0]),
    "any_object": ({"type": "object"}, {}),
    "min_length": ({"type": "string", "minLength": 5}, "abcde"),
    "minimum": ({"type": "integer", "minimum": 100}, 102),
    "negative": ({"type": "integer", "maximum": -1}, -1),
    "enum": ({"enum": ["red", "green"]}, "green"),
    "const": ({"const": {"a": [1, 2]}}, {"a": [1, 2]}),
    "required": (
        {
            **OBJECT,
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
            "required": ["name", "age", "tags"],
        },
        {"name": "", "age": 0, "tags": []},
    ),
    "optional": ({**OBJECT, "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}, {}),
    "nested": (
        {
            **OBJECT,
            "properties": {
                "in": {
                    **OBJECT,
                    "properties": {"x": {"type": "number"}, "y": {"type": "null"}},
                    "required": ["x", "y"],
                }
            },
            "required": ["in"],
        },
        {"in": {"x": 0, "y": None}},
    ),
    "recursive": (
        {
            "$defs": {
                "node": {
                    **OBJECT,
                    "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
                    "required": ["v"],
                }
            },
            "$ref": "#/$defs/node",
        },
        {"v": 0},
    ),
    "pattern": ({"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"}, "AB0"),
    "any_of": ({"anyOf": [{"type": "object"}, {"type": "array"}, {"type": "boolean"}]}, True),
}


@pytest.mark.parametrize("forces", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_gets_its_minimal_instance(name: str, temperature: float, forces: bool) -> None:
    value, wanted = SCHEMAS[name]
    text = text_of(answer(schema(value, whitespace_flexible=False), temperature=temperature, forces=forces))
    found = json.loads(text)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize("forces", [True, False])
@pytest.mark.parametrize("name", SCHEMAS)
def test_white_space_that_may_come_does_not(name: str, forces: bool) -> None:
    value, wanted = SCHEMAS[name]
    assert json.loads(text_of(answer(schema(value, whitespace_flexible=True), forces=forces))) == wanted


@pytest.mark.parametrize(
    "value",
    [
        {"type": "array", "items": {"type": "integer"}, "minItems": 60},
        {"type": "array", "items": {"type": "object"}, "minItems": 30},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 15},
        {"type": "string", "minLength": 150},
        {"type": "array", "items": {"type": "string"}, "minItems": 40},
        {"type": "string", "pattern": "^[,:}]+!$"},
        {"type": "string", "pattern": "^([0-9],)+x$"},
        {},
    ],
)
def test_long_and_odd_values_end_and_are_valid(value: dict[str, Any]) -> None:
    found = json.loads(text_of(answer(schema(value, whitespace_flexible=False))))
    if value.get("type") == "array":
        assert len(found) == value["minItems"]
    if "pattern" in value:
        assert re.fullmatch(value["pattern"][1:-1], found)


PATTERNS = [
    "[0-9]+x",
    "[0-9]+-[0-9]+",
    r"[0-9]+\.[0-9]+!",
    r"[a-z]+@[a-z]+\.com",
    r"(\d,)+x",
    "[,a]+x",
    r"[\",]+;",
    "([a-z]+ )+[0-9]",
    r"\w+ \w+ \w+\.",
    "(a|b)*c",
    "(ab,cdefgh)+x",
    "a{3,}b",
    "[^x\n]+x",
    "[a-z]+\xe9",
    "[^\x00-\x7f]+z",
    r"(\[\]|\{\})+;",
    r"-+>",
    r"[ \t\n]+x",
    "x{40}",
    "(yes|no|maybe)",
    r"[A-Za-z0-9+/]+=",
    r"(\d{3}-){1,}\d{4}z",
]


@pytest.mark.parametrize("forces", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_ends(pattern: str, forces: bool) -> None:
    text = text_of(answer(LLMatcher.grammar_from_regex(pattern), forces=forces))
    assert re.fullmatch(pattern, text, re.ASCII if r"\w" in pattern else 0), text


def test_a_pattern_of_nearly_everything_ends() -> None:
    """Quotes look like values that are closed; they come in pairs between other bytes."""
    text = text_of(answer(LLMatcher.grammar_from_regex(r"[^\s!]+!"), most=300))
    assert re.fullmatch(r"[^\s!]+!", text)


def test_a_choice_of_a_lark_grammar_ends() -> None:
    grammar = 'start: item ("," item)+ ";"\nitem: /[a-z]+/ | "(" start ")"\n'
    text = text_of(answer(LLMatcher.grammar_from_lark(grammar)))
    assert re.fullmatch(r"[a-z]+(,[a-z]+)+;", text)


def test_free_text_goes_on_as_the_echo_does() -> None:
    wanted = expected_tokens(PROMPT, 20)
    memory = np.zeros((1, 2, NUM_BLOCKS, 1, BLOCK, 32), np.uint8)
    runner = EchoRunner(memory, max_slots=1, max_step_tokens=512)
    guide = LlGuide(LLMatcher.grammar_from_regex(r"(?s:.*)"), len(PROMPT), forces=True)
    tokens = list(PROMPT)
    for _ in wanted:
        spec = SampleSpec(0.0, 1.0, 0, 0, len(tokens), guide=guide)
        row = StepRow(
            slot=0,
            num_tokens=len(tokens),
            tokens=tuple(tokens),
            start=0,
            blocks=list(range(NUM_BLOCKS)),
            sample=spec,
        )
        runner.launch(StepPlan(1, (row,)))
        result = runner.collect()
        assert not result.forced
        tokens.append(result.tokens[0] or 0)
    assert tokens[len(PROMPT) :] == wanted


def test_rules_bar_what_the_form_would_write() -> None:
    zero = FIRST_BYTE + ord("0")
    rules = LogitRules(num_prompt=len(PROMPT), bad_words=((zero,),))
    assert text_of(answer(schema({"type": "integer"}, whitespace_flexible=False), rules=rules)) == "1"


def mask(*ids: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    allowed = np.zeros(VOCAB_SIZE, bool)
    allowed[list(ids)] = True
    return allowed


def test_where_nothing_or_no_byte_is_allowed() -> None:
    assert shortest(mask(), PROMPT) is None
    assert shortest(mask(900, 17), PROMPT) == 17
    assert shortest(mask(17, FIRST_BYTE + 1, END), PROMPT) == END
    assert not is_free(mask(*range(NUM_WORDS)))
    assert is_free(mask(*range(VOCAB_SIZE)))
    assert shortest(mask(FIRST_BYTE + 200), ()) == FIRST_BYTE + 200
