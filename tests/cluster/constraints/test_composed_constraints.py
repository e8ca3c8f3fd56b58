"""Forms and tools as one grammar: what it lets a model write is what the parser reads back, and nothing broken."""

from __future__ import annotations

import json
import random

import pytest

from diptych.cluster.constraints import trial
from diptych.cluster.constraints.compose import Composed, compose
from diptych.cluster.constraints.testing import walk
from diptych.cluster.formats import calls
from diptych.cluster.formats.format import TOOL_FORMATS, Format, ToolFormat
from diptych.cluster.formats.parser import OutputParser
from diptych.protos.constraint import Backend
from diptych.protos.deltas import CallArguments, CallBegin, Content
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_output import Kind, OutputForm
from diptych.protos.openai_tools import Mode, Tool, ToolUse

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
COUNT = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
TOOLS = tuple(Tool(name=n, description=None, parameters=p) for n, p in (("get_weather", CITY), ("get", COUNT)))
FORM = OutputForm(
    kind="json_schema",
    value='{"type":"object","properties":{"answer":{"$ref":"#/$defs/a"}},"required":["answer"],"$defs":{"a":{"type":"string"}}}',
    path="response_format",
)
ONE, TWO = [("get", '{"n": 1}')], [("get_weather", '{"city": "Paris"}'), ("get", "{}")]


def use(
    mode: Mode, *, parallel: bool = True, names: tuple[str, ...] = ("get_weather", "get"), named: bool = False
) -> ToolUse:
    return ToolUse(tools=TOOLS, mode=mode, names=names, parallel=parallel, is_named=named)


def grammar(composed: Composed | None) -> str:
    assert composed is not None
    assert composed.constraint.backend is Backend.LLGUIDANCE
    return composed.constraint.grammar


def read(format: ToolFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of an answer."""
    parser = OutputParser(Format(tools=format), tool_names=[tool.name for tool in TOOLS])
    content, found = "", []
    for delta in [*parser.feed(text), *parser.finish()]:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, CallBegin):
            found.append([delta.name, ""])
        elif isinstance(delta, CallArguments):
            found[-1][1] += delta.text
    return content, [(name, arguments) for name, arguments in found]


every_format = pytest.mark.parametrize("format", TOOL_FORMATS.values(), ids=TOOL_FORMATS.keys())


@every_format
def test_required_calls_are_calls_and_nothing_else(format: ToolFormat) -> None:
    """With tool_choice "required" a model answered in prose, or called what was not offered."""
    many, one = (
        grammar(compose(None, use("required"), format)),
        grammar(compose(None, use("required", parallel=False), format)),
    )
    named = grammar(compose(None, use("required", names=("get",), named=True), format))
    assert trial.accepts(many, calls.write_calls(format, TWO))
    assert trial.accepts(one, calls.write_calls(format, ONE))
    assert trial.accepts(named, calls.write_calls(format, ONE))
    assert not trial.accepts(one, calls.write_calls(format, TWO))
    assert not trial.accepts(named, calls.write_calls(format, TWO[:1]))
    for text in (
        "",
        "hello",
        calls.write_calls(format, [("nope", "{}")]),
        calls.write_calls(format, [("get", '{"n":"x"}')]),
    ):
        assert not trial.accepts(many, text), text


@every_format
def test_a_free_choice_is_text_or_whole_calls(format: ToolFormat) -> None:
    """With tool_choice "auto" a call was begun and then went on as text, or with arguments by no schema."""
    free, one = grammar(compose(None, use("auto"), format)), grammar(compose(None, use("auto", parallel=False), format))
    for text in ("", "hello", "what? {}", "a\nb < c"):
        assert trial.accepts(free, text), text
    assert trial.accepts(free, calls.write_calls(format, TWO))
    assert not trial.accepts(one, calls.write_calls(format, TWO))
    assert trial.accepts(one, calls.write_calls(format, ONE))
    if calls.trigger(format):
        called = "hello " + calls.write_calls(format, ONE, in_text=True)
        assert trial.accepts(free, called)
        assert trial.accepts(free, called + " and " + calls.write_calls(format, TWO, in_text=True) + " bye")
        assert trial.accepts(one, called)
        assert not trial.accepts(one, called + " bye")
        assert not trial.accepts(free, f"hello {calls.trigger(format)} there")
        assert not trial.accepts(free, "hello " + calls.write_calls(format, [("nope", "{}")], in_text=True))


@every_format
def test_the_parser_reads_what_the_grammar_lets_be_written(format: ToolFormat) -> None:
    """Grammar and parser held different things for a call: arguments came out as content."""
    rng = random.Random(7)
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    composed = compose(None, use("required"), format)
    for text in filter(None, (walk(grammar(composed), rng) for _ in range(12))):
        content, found = read(format, text)
        assert not content, text
        assert found, text
        for name, arguments in found:
            assert isinstance(json.loads(arguments), dict), text
            assert name in schemas
    for text in filter(None, (walk(grammar(compose(None, use("auto"), format)), rng) for _ in range(12))):
        for _, arguments in read(format, text)[1]:
            assert isinstance(json.loads(arguments), dict), text


@every_format
def test_calls_or_the_form(format: ToolFormat) -> None:
    """response_format together with tools: the model could write neither, or prose."""
    either = grammar(compose(FORM, use("auto"), format))
    assert trial.accepts(either, '{"answer": "x"}')
    assert trial.accepts(either, calls.write_calls(format, ONE))
    assert not trial.accepts(either, "hello")
    assert not trial.accepts(either, '{"answer": 1}')
    assert not trial.accepts(either, calls.write_calls(format, [("get", '{"n":"x"}')]))


def test_markers_that_are_tokens_are_written_as_tokens() -> None:
    """A marker spelled in characters is not the token that the model was trained on, and text for the engine."""
    hermes = TOOL_FORMATS["hermes"]
    composed = compose(None, use("auto"), hermes, token_ids={"<tool_call>": 1, "</tool_call>": 2, "elsewhere": 3})
    written = calls.write_calls(hermes, ONE)
    as_tokens = written.replace("</tool_call>", "\x02").replace("<tool_call>", "\x01")
    assert trial.accepts(grammar(composed), as_tokens)
    assert trial.accepts(grammar(composed), "hello " + as_tokens)
    assert not trial.accepts(grammar(composed), "hello " + written)


def test_what_is_not_enforced_is_named_in_the_request() -> None:
    """Notes spoke of "properties.a" without telling of which tool."""
    loose = Tool(
        name="loose", description=None, parameters={"type": "object", "properties": {"a": {"uniqueItems": True}}}
    )
    tools = ToolUse(tools=(*TOOLS, loose), mode="auto", names=("loose",))
    composed = compose(None, tools, TOOL_FORMATS["hermes"])
    assert composed is not None
    assert composed.coverage == "partial"
    assert [note.path for note in composed.notes] == ["tools[2].function.parameters.properties.a.uniqueItems"]
    bad = Tool(name="bad", description=None, parameters={"type": "object", "properties": {"a": {"type": "strnig"}}})
    with pytest.raises(InvalidRequest) as caught:
        compose(None, ToolUse(tools=(*TOOLS, bad), mode="required", names=("bad",)), TOOL_FORMATS["json"])
    assert caught.value.param == "tools[2].function.parameters.properties.a.type"


def test_no_constraint_where_nothing_is_asked() -> None:
    """Plain chats paid for a grammar of any text."""
    hermes = TOOL_FORMATS["hermes"]
    assert compose(None, None, hermes) is None
    assert compose(None, use("none", names=()), hermes) is None
    assert compose(None, use("auto"), None) is None
    with pytest.raises(InvalidRequest, match="not known how this model writes calls"):
        compose(None, use("required"), None)


FORMS = [
    ("json_object", '{"type":"object"}', ['{"a": [1, {"b": null}]}', "{}"], ["[]", "1", '{"a":  1}']),
    ("regex", "^[0-9]{3}-(a|b)$", ["123-a"], ["123-c", "x123-a"]),
    (
        "choice",
        ("yes", "yes!", "a|b", 'quo"te\n', "\u00e9"),
        ["yes", "yes!", "a|b", 'quo"te\n', "\u00e9"],
        ["no", "a", ""],
    ),
    ("grammar", 'start: "a"+ B\nB: /[0-9]/', ["aa1"], ["a", "1"]),
    ("grammar", 'root ::= item ("," item)*\nitem ::= [a-z]+', ["ab,c"], ["ab,", "1"]),
    ("grammar", '%import common.INT\nstart: INT "<|im_end|>"', ["12<|im_end|>"], ["12"]),
    ("json_schema", FORM.value, ['{"answer": "x"}'], ['{"answer": 1}']),
]


@pytest.mark.parametrize(("kind", "value", "good", "bad"), FORMS, ids=lambda value: str(value)[:30])
def test_each_kind_of_form(kind: Kind, value: str | tuple[str, ...], good: list[str], bad: list[str]) -> None:
    """Each of vLLM's and OpenAI's ways to ask for a form."""
    made = grammar(compose(OutputForm(kind=kind, value=value, path=f"guided_{kind}"), None, None))
    assert [text for text in good if not trial.accepts(made, text)] == []
    assert [text for text in bad if trial.accepts(made, text)] == []


FAULTS = [
    ("regex", "a(?=b)", "look-around"),
    ("regex", "(a)\\1", "backreferences"),
    ("grammar", 'start: "a', "line 1, column 10"),
    ("grammar", 'start: "a"\n  b', "line 2"),
    ("grammar", "start: <|im_end|>", "line 1, column 8: <|im_end|> names a token"),
    ("grammar", 'start: "a" <[128001]>', "names a token"),
    ("grammar", "start: @other", "names a token or a grammar"),
    ("grammar", '%llguidance {"no_forcing": true}\nstart: "a"', "%llguidance is not taken"),
    ("grammar", 'start: a\na[max_tokens=3]: "x"', "belong to the request"),
    ("grammar", "%import mine.X\nstart: X", "only %import common.NAME"),
    ("grammar", "root ::= (", "GBNF"),
    ("grammar", 'root ::= "a" undefined', "undefined"),
    ("grammar", '{"grammars": [{"lark_grammar": "start: <|im_end|>"}]}', "line 1"),
    ("grammar", " ", "is empty"),
    ("grammar", "start: start", "no text matches this grammar"),
    ("grammar", 'S: "a"', "no rule named start"),
    ("regex", r"[^\s\S]", "no text matches this pattern"),
]


@pytest.mark.parametrize(("kind", "text", "words"), FAULTS, ids=lambda value: value[:30])
def test_faults_of_a_clients_grammar_are_placed(kind: Kind, text: str, words: str) -> None:
    """A grammar could name the end-of-turn token, and an error said only that it did not compile."""
    with pytest.raises(InvalidRequest) as caught:
        compose(OutputForm(kind=kind, value=text, path=f"guided_{kind}"), None, None)
    assert caught.value.param == f"guided_{kind}"
    assert words in str(caught.value)
