"""What single answers of each format turn into: calls, reasoning, content, and everything that is nearly one of them.

Guards against text that vanishes, arguments that change, calls made of prose, and calls that are missed.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.cluster.formats.detect import named
from diptych.cluster.formats.format import CALL_BEGIN, CALL_END, CALL_SEP, CALLS_BEGIN, CALLS_END
from diptych.cluster.formats.parser import OutputParser
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Delta, Reasoning

TOOLS = ("f", "g", "get_weather")
F = 'f", "arguments": '
MARKED = '{"s": "</tool_call><tool_call>{\\"name\\": \\"g\\"}", "t": [{"u": {}}]}'
ESCAPED = '{"s": "\\\\\\" \\u00e9 \u00e9 \U0001f600 \\n }]"}'


def parse(tools: str | None, text: str, **options: Any) -> list[Any]:
    """Content as a string, reasoning as a list of one, a call as (name, arguments)."""
    options.setdefault("tool_names", TOOLS)
    parser = OutputParser(named(tools, options.pop("reasoning", "think")), **options)
    return short([*parser.feed(text), *parser.finish()])


def short(deltas: list[Delta]) -> list[Any]:
    out: list[Any] = []
    last: type[Delta] | None = None
    for delta in deltas:
        match delta:
            case Content(text):
                out.append(out.pop() + text if last is Content else text)
            case Reasoning(text):
                out.append([out.pop()[0] + text] if last is Reasoning else [text])
            case CallBegin(_, name):
                out.append((name, ""))
            case CallArguments(index, text):
                assert sum(isinstance(o, tuple) for o in out) == index + 1
                out[-1] = (out[-1][0], out[-1][1] + text)
            case CallEnd(index):
                assert sum(isinstance(o, tuple) for o in out) == index + 1
        last = type(delta)
    return out


def tag(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


HERMES: list[tuple[str, list[Any]]] = [
    ("Hello, world.\n", ["Hello, world.\n"]),
    (tag('{"name": "' + F + '{"a": 1}}'), [("f", '{"a": 1}')]),
    (tag('{"name": "' + F + "{}}") + "\n" + tag('{"name": "g", "arguments": [1,2]}'), [("f", "{}"), ("g", "[1,2]")]),
    ("Sure.\n\n" + tag('{"name": "' + F + "{}}") + "\nDone. \n", ["Sure.", ("f", "{}"), "Done. \n"]),
    (tag('{"arguments": {"a": "x"}, "name": "f"}'), [("f", '{"a": "x"}')]),
    (tag('[{"name": "' + F + '{}}, {"name": "g", "arguments": {}}]'), [("f", "{}"), ("g", "{}")]),
    (tag('{"name": "' + F + '{}}\n{"name": "g", "arguments": {}}'), [("f", "{}"), ("g", "{}")]),
    (tag('{"name": "' + F + MARKED + "}"), [("f", MARKED)]),
    (tag('{"name": "' + F + ESCAPED + "}"), [("f", ESCAPED)]),
    (tag('{"name": "' + F + json.dumps(ESCAPED) + "}"), [("f", ESCAPED)]),
    (tag('{"name": "' + F + '"{\\"a\\": \\"\\ud83d \\udc00\\"}"}'), [("f", '{"a": "\\ud83d \\udc00"}')]),
    (tag('{"name": "' + F + '"Paris"}'), [("f", '"Paris"')]),
    (tag('{"name": "' + F + '""}'), [("f", "{}")]),
    (tag('{"name": "' + F + "null}"), [("f", "{}")]),
    (tag('{"name": "' + F + "[1, {}]}"), [("f", "[1, {}]")]),
    (tag('{"name": "' + F + "12.5}"), [("f", "12.5")]),
    (tag('{"name": "' + F + "}"), [("f", "{}")]),
    (tag('{"name": "f"}'), [("f", "{}")]),
    (tag('{"name": "unknown", "arguments": {}}'), [("unknown", "{}")]),
    (tag('{"n\\u0061me": "\\u0066", "parameters": {}}'), [("f", "{}")]),
    (tag('{"id": {"x": ["}"]}, "name": "' + F + '{}, "type": "function"}'), [("f", "{}")]),
    (tag('{"name": "f", "name": "g", "arguments": {"a": 1}, "arguments": {"b": 2}}'), [("f", '{"a": 1}')]),
    (tag('{"name": "' + F + '{"a": 1}'), [("f", '{"a": 1}')]),
    (tag('{"name": "' + F + '{"a": 1}}}'), [("f", '{"a": 1}')]),
    (tag('{"name": "' + F + '{"a": [1, 2'), [("f", '{"a": [1, 2\n')]),
    (tag('{"name": "' + F + "{'a': 1,, b}}"), [("f", "{'a': 1,, b}")]),
    ('<tool_call>{"name": "' + F + '{"a": "unclosed</tool_call>', [("f", '{"a": "unclosed</tool_call>')]),
    ('<tool_call>{"name": "' + F + '{"a": 1</tool_c', [("f", '{"a": 1</tool_c')]),
    ('<tool_call>{"name": "' + F + '{}}</tool_c', [("f", "{}"), "</tool_c"]),
    ('<tool_call>{"name": "' + F, [("f", "")]),
    ('<tool_call>{"name": "' + F + '"', [("f", '"')]),
    ('<tool_call>{"name": "f", arguments: {}}</tool_call>', [("f", ""), "arguments: {}}</tool_call>"]),
    (" <tool_call>{'name': 'f'}</tool_call>", [" <tool_call>{'name': 'f'}</tool_call>"]),
    ("a \n<tool_call>half <tool_call>" + '{"name": "f"}', ["a \n<tool_call>half", ("f", "{}")]),
    ("<tool_call>\n<function=f>\n</function></tool_call>", ["<tool_call>\n<function=f>\n</function></tool_call>"]),
    ('<tool_call>{"name": "', ['<tool_call>{"name": "']),
    ('<tool_call>{"arguments": {"a": 1}}</tool_call>', ['<tool_call>{"arguments": {"a": 1}}</tool_call>']),
    ('<tool_call>{"name": ""}</tool_call>', ['<tool_call>{"name": ""}</tool_call>']),
    ('<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
    ("1 < 2 and <tool> and </tool_call>", ["1 < 2 and <tool> and </tool_call>"]),
    ("<think>\nhm\n</think>\n\nSure.\n" + tag('{"name": "' + F + "{}}"), [["hm"], "Sure.", ("f", "{}")]),
    ("<think>" + tag('{"name": "' + F + "{}}") + "</think>ok", [[tag('{"name": "' + F + "{}}")], "ok"]),
    ("\n<think>\n\n</think>\n\nok", ["ok"]),
    ("<think>never ends <think> \n", [["never ends <think> \n"]]),
    ("<think>a</think><think>b</think>", [["a"], "<think>b</think>"]),
    ("The <think> tag.</think>", ["The <think> tag.</think>"]),
    ("<thi", ["<thi"]),
]  # fmt: skip

LLAMA: list[tuple[str, list[Any]]] = [
    ('{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
    ('\n {"name": "f", "parameters": {"a": 1}}\n', [("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', [("f", "{}"), ("g", "{}")]),
    ('{"name": "f", "parameters": {}}\n{"name": "g", "arguments": {}}', [("f", "{}"), ("g", "{}")]),
    ('<|python_tag|>{"name": "zz", "parameters": {}}', [("zz", "{}")]),
    ('Sure. <|python_tag|>{"name": "f", "parameters": {}};{"name": "g"}', ["Sure.", ("f", "{}"), ("g", "{}")]),
    ('{"parameters": {"a": {}}, "name": "f"}', [("f", '{"a": {}}')]),
    ('{"type": "function", "name": "f", "parameters": {}}', [("f", "{}")]),
    ('{"name": "f"}', [("f", "{}")]),
    ('{"name": "f", "parameters": null}', [("f", "{}")]),
    ('{"name": "f", "parameters": "{\\"a\\": 1}"}', [("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": {}} and more', [("f", "{}"), "and more"]),
    ('{"name": "f", "parameters": {}}; {"x": 1}', [("f", "{}"), '; {"x": 1}']),
    ('{"name": "f", "parameters": {}}; {"na" : 1}', [("f", "{}"), '; {"na" : 1}']),
    ('{"x <|python_tag|>{"name": "f", "parameters": {}}', ['{"x', ("f", "{}")]),
    ('{"name": "f", "parameters": {"a": 1', [("f", '{"a": 1')]),
    ("<think>hm</think>\n" + '{"name": "f", "parameters": {}}', [["hm"], ("f", "{}")]),
]
LLAMA_PROSE = [
    '{"name": "Alice", "parameters": {}}',
    '{"name": "f", "description": {}}',
    '{"name": "f", "parameters": [1]}',
    '{"name": "f", "parameters": "Paris"}',
    '{"name": "f", "parameters": 7}',
    '{"name": "f", "para',
    '{"name": "f',
    '{"parameters": {"a": 1}, "name": "h"}',
    '{"name": "f" "x',
    '{"a": [{"name": "f", "parameters": {}}]}',
    "{} \n",
    " { not json",
    '[{"name": "f", "parameters": {}}]',
    'So: {"name": "f", "parameters": {}}',
    "<|python_tag|>print(1)\n",
    "<|python",
]

MISTRAL: list[tuple[str, list[Any]]] = [
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', [("f", '{"a": 1}')]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {}}, {"arguments": {}, "name": "g"}]', [("f", "{}"), ("g", "{}")]),
    ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', [("f", '{"a": 1}'), ("g", "{}")]),
    ('ok [TOOL_CALLS]f{"a": "[TOOL_CALLS]"}', ["ok", ("f", '{"a": "[TOOL_CALLS]"}')]),
    ('[TOOL_CALLS] f [CALL_ID] 123456789 [ARGS] {"a": [[1]]}', [("f", '{"a": [[1]]}')]),
    ("[TOOL_CALLS]f[CALL_ID]123{}", [("f", "{}")]),
    ("[TOOL_CALLS]f[CALL_ID]what is this", [("f", ""), "is this"]),
    ("[TOOL_CALLS]f[ARGS][TOOL_CALLS]g[ARGS]", [("f", "{}"), ("g", "")]),
    ('[TOOL_CALLS]f[ARGS]{"a": [TOOL_CALLS]g{}', [("f", '{"a": '), ("g", "{}")]),
    ('[TOOL_CALLS]f[ARGS]{"a": [', [("f", '{"a": [')]),
    ('[TOOL_CALLS]f[ARGS]"{\\"a\\": 1}"', [("f", '{"a": 1}')]),
    ("[TOOL_CALLS][TOOL_CALLS]f{}", ["[TOOL_CALLS]", ("f", "{}")]),
    ("[TOOL_CALLS][ARGS]{}", ["[TOOL_CALLS][ARGS]{}"]),
    ("[TOOL_CALLS] [1, 2]", ["[TOOL_CALLS] [1, 2]"]),
    ("[TOOL_CALLS]two words{}", ["[TOOL_CALLS]two words{}"]),
    ("[TOOL_CALLS]" + "x" * 300 + "{}", ["[TOOL_CALLS]" + "x" * 300 + "{}"]),
    ("[TOOL_CALLS]f", ["[TOOL_CALLS]f"]),
    ("[1] and [TOOL", ["[1] and [TOOL"]),
    ("[THINK]hm\n[/THINK]\nok", [["hm"], "ok"]),
]


def deepseek(*calls: str) -> str:
    return CALLS_BEGIN + "".join(CALL_BEGIN + call + CALL_END for call in calls) + CALLS_END


def fenced(name: str, arguments: str) -> str:
    return f"function{CALL_SEP}{name}\n```json\n{arguments}\n```"


DEEPSEEK: list[tuple[str, list[Any]]] = [
    (deepseek(fenced("f", '{"a": 1}'), "\n" + fenced("g", "{}")), [("f", '{"a": 1}'), ("g", "{}")]),
    (deepseek("f" + CALL_SEP + '{"a": 1}', "g" + CALL_SEP + "{}"), [("f", '{"a": 1}'), ("g", "{}")]),
    ("Sure.\n" + deepseek("f" + CALL_SEP + "{}") + "\nok", ["Sure.", ("f", "{}"), "ok"]),
    (CALL_BEGIN + "f" + CALL_SEP + "{}", [("f", "{}")]),
    (deepseek("function" + CALL_SEP + '{"a": 1}'), [("function", '{"a": 1}')]),
    (deepseek(fenced("function", "{}")), [("function", "{}")]),
    (deepseek(fenced("f", '{"a": "' + CALL_END + '"}')), [("f", '{"a": "' + CALL_END + '"}')]),
    (deepseek("f" + CALL_SEP + '{"a": 1'), [("f", '{"a": 1')]),
    (deepseek("f" + CALL_SEP), [("f", "{}")]),
    (deepseek("f" + CALL_SEP + '"{\\"a\\": 1}"'), [("f", '{"a": 1}')]),
    (CALLS_BEGIN + CALL_BEGIN + fenced("f", '{"a"')[:-4], [("f", '{"a"')]),
    (CALLS_BEGIN + "no call", [CALLS_BEGIN + "no call"]),
    (CALLS_BEGIN + CALL_BEGIN + "f", [CALLS_BEGIN + CALL_BEGIN + "f"]),
    (CALL_BEGIN + "two words" + CALL_SEP + "{}", [CALL_BEGIN + "two words" + CALL_SEP + "{}"]),
    (CALL_BEGIN + CALL_SEP + "{}", [CALL_BEGIN + CALL_SEP + "{}"]),
    (CALL_BEGIN[:9], [CALL_BEGIN[:9]]),
]

PLAIN_JSON: list[tuple[str, list[Any]]] = [
    ('{"name": "f", "arguments": {"a": 1}}', [("f", '{"a": 1}')]),
    ('[{"name": "f", "parameters": {}}, {"name": "g", "arguments": {}}]', [("f", "{}"), ("g", "{}")]),
    ('[{"name": "f", "arguments": {}}, {"name": "h"}]', [("f", "{}"), ', {"name": "h"}]']),
    ('[{"name": "f", "arguments": {}}] \nok', [("f", "{}"), "ok"]),
    ("[1, 2]", ["[1, 2]"]),
    ("[", ["["]),
    ('[{"name": "h", "arguments": {}}]', ['[{"name": "h", "arguments": {}}]']),
    ('```json\n{"name": "f", "arguments": {}}\n```', ['```json\n{"name": "f", "arguments": {}}\n```']),
    ("eval(__import__('os'))", ["eval(__import__('os'))"]),
]

CASES = [
    *(("hermes", *case) for case in HERMES),
    *(("llama3", *case) for case in LLAMA),
    *(("llama3", text, [text]) for text in LLAMA_PROSE),
    *(("mistral", *case) for case in MISTRAL),
    *(("mistral-list", *case) for case in MISTRAL),
    *(("deepseek", *case) for case in DEEPSEEK),
    *(("deepseek-v3", *case) for case in DEEPSEEK),
    *(("json", *case) for case in PLAIN_JSON),
]


@pytest.mark.parametrize(("format", "text", "expected"), CASES)
def test_an_answer_becomes_what_it_says_at_any_chunking(format: str, text: str, expected: list[Any]) -> None:
    """A table of what each format's answers mean; one call of `feed` and one per character agree."""
    reasoning = "magistral" if "THINK" in text else "think"
    assert parse(format, text, reasoning=reasoning) == expected
    parser = OutputParser(named(format, reasoning), tool_names=TOOLS)
    single = [delta for char in text for delta in parser.feed(char)]
    assert short([*single, *parser.finish()]) == expected
    assert parser.finish() == []


@pytest.mark.parametrize("names", [None, ()])
@pytest.mark.parametrize(("format", "text", "expected"), CASES)
def test_without_offered_tools_nothing_is_a_call(
    format: str, text: str, expected: list[Any], names: tuple[str, ...] | None
) -> None:
    """A request without tools got tool calls when the model quoted a marker."""
    assert parse(format, text, reasoning=None, tool_names=names) == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hm\n</think>\n\nok", [["hm"], "ok"]),
        ("\n<think>\nhm</think>ok", [["hm"], "ok"]),
        ("never ends", [["never ends"]]),
        ("</think>{", ["{"]),
        ("a </thin", [["a </thin"]]),
        ("a" + " " * 40 + "</think>", [["a" + " " * 24]]),
    ],
)
def test_a_prompt_that_ended_in_the_reasoning(text: str, expected: list[Any]) -> None:
    """The template wrote the start marker: without telling so the whole reasoning came out as content."""
    assert parse("hermes", text, in_reasoning=True) == expected


def test_reasoning_needs_its_markers() -> None:
    """An answer that could never leave the reasoning is a mistake of the caller."""
    with pytest.raises(ValueError, match="none"):
        OutputParser(named("hermes", None), in_reasoning=True)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", '<tool_call>{"name": "f"'),
        ("mistral", "[TOOL_CALLS]f[ARGS]"),
        ("mistral-list", '[TOOL_CALLS][{"name": "f"'),
        ("deepseek", CALL_BEGIN + "f" + CALL_SEP),
        ("deepseek-v3", CALL_BEGIN + "function" + CALL_SEP + "f\n"),
        ("llama3", '{"name": "f", "parameters": {'),
        ("json", '[{"name": "f", "parameters": {'),
    ],
)
def test_a_call_begins_at_the_character_that_decides_it(format: str, text: str) -> None:
    """The name of a call was held until its arguments were whole, so nothing streamed."""
    parser = OutputParser(named(format, None), tool_names=TOOLS)
    assert parser.feed(text[:-1]) == []
    assert parser.feed(text[-1])[0] == CallBegin(0, "f")


@pytest.mark.parametrize("text", ['{"n', '{"x', '{"name": "h', '{"name": "f"}', "[3", '{"name": "f", "d', "{5", "x"])
def test_prose_in_json_is_let_go_at_the_character_that_decides_it(text: str) -> None:
    """An answer in JSON was held to its end, because it could have been a call."""
    parser = OutputParser(named("json", None), tool_names=TOOLS)
    before = "".join(short(parser.feed(text[:-1])))
    after = short(parser.feed(text[-1]))
    assert before == ""
    assert after == ([] if text == '{"n' else [("f", "{}")] if text[-1] == "}" else [text])
