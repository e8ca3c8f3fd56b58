"""What is written in a format is read back; templates and tokens give the format that the model writes.

Guards against grammars that force text which nobody parses, and models whose calls come out as text.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.formats import calls
from diptych.cluster.formats.detect import detect, named
from diptych.cluster.formats.format import CALL_BEGIN, CALL_SEP, REASONING_FORMATS, TOOL_FORMATS, Format, ToolFormat
from diptych.cluster.formats.parser import OutputParser
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Delta

NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from(["</tool_call>", "[TOOL_CALLS]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.builds(
    lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only),
    st.dictionaries(st.text(max_size=8), VALUES, max_size=4),
    st.booleans(),
)
by_format = pytest.mark.parametrize("format", TOOL_FORMATS.values(), ids=lambda f: f.name)


def read(format: ToolFormat, text: str, names: list[str]) -> list[Delta]:
    parser = OutputParser(Format(format), tool_names=names)
    return [*parser.feed(text), *parser.finish()]


@by_format
@given(wanted=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=4))
def test_what_is_written_is_read_back(format: ToolFormat, wanted: list[tuple[str, str]]) -> None:
    """A forced call in one spelling, and a parser for another."""
    expected: list[Delta] = []
    for index, (name, arguments) in enumerate(wanted):
        expected += [CallBegin(index, name), CallArguments(index, arguments), CallEnd(index)]
    names = [name for name, _ in wanted]
    assert read(format, calls.write_calls(format, wanted), names) == expected
    assert read(format, calls.write_call(format, *wanted[0]), names) == expected[:3]
    if format.triggers:
        assert read(format, "Sure.\n" + calls.write_calls(format, wanted, in_text=True), names) == [
            Content("Sure."),
            *expected,
        ]


@by_format
def test_a_trigger_begins_what_follows_text(format: ToolFormat) -> None:
    """A grammar that switches at the trigger never switched, as the call began with something else."""
    trigger = calls.trigger(format)
    assert (trigger is None) == (format.name == "json")
    assert (calls.lead(format, in_text=True) + calls.prefix(format, "f")).startswith(trigger or "")


@by_format
@pytest.mark.parametrize("name", ["", "x" * 257])
def test_a_name_that_cannot_be_written_is_refused(format: ToolFormat, name: str) -> None:
    """A grammar for a name that the parser does not read."""
    with pytest.raises(ValueError, match="cannot be written"):
        calls.prefix(format, name)


@pytest.mark.parametrize("name", ["two words", "a<b", 'q"', "a[0]"])
def test_names_without_quotes_are_plain(name: str) -> None:
    """A bracket in a bare name is read as the beginning of the arguments."""
    with pytest.raises(ValueError, match="cannot be written"):
        calls.prefix(TOOL_FORMATS["mistral"], name)
    assert read(TOOL_FORMATS["hermes"], calls.write_call(TOOL_FORMATS["hermes"], name, "{}"), [name])[0] == CallBegin(
        0, name
    )


QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{{- \"For each function call, return a json object with "
    "function name and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}'
)
LLAMA = '{{- \'Respond in the format {"name": function name, "parameters": {}}\' }}{{- "<|python_tag|>" }}'
DETECTED: list[tuple[str | None, set[str], str | None, str | None]] = [
    (QWEN, {"<tool_call>", "</tool_call>"}, "hermes", None),
    (QWEN + "{{ '<think>\\n\\n</think>' }}", set(), "hermes", "think"),
    (QWEN, {"<think>", "</think>"}, "hermes", "think"),
    (QWEN + "<function=example_function_name>", {"<tool_call>"}, None, None),
    ("[gMASK]<tool_call>{{ name }}<arg_key>{{ k }}</arg_key>", {"<tool_call>"}, None, None),
    (LLAMA, set(), "llama3", None),
    ("{{ messages }}", {"<|python_tag|>"}, "llama3", None),
    (QWEN, {"<|python_tag|>"}, "hermes", None),
    ("{{ '[TOOL_CALLS] [' }}", {"[ARGS]"}, "mistral-list", None),
    ("{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}[THINK]", set(), "mistral", "magistral"),
    (None, {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}, "mistral", None),
    (
        "{{'" + CALL_BEGIN + "function" + CALL_SEP + "' + name + '\\n```json\\n'}}</think>",
        set(),
        "deepseek-v3",
        "think",
    ),
    ("{{'" + CALL_BEGIN + "' + name + '" + CALL_SEP + "'}}", set(), "deepseek", None),
    ("{{ '<|im_start|>' + message.content }}", set(), "json", None),
    (None, set(), "json", None),
    ("Write after 'Here is my thought process:' and 'Here is my response:'", set(), "json", "granite"),
    ("<|START_THINKING|><|END_THINKING|><|START_ACTION|>", set(), None, "cohere"),
]


@pytest.mark.parametrize(("template", "vocabulary", "tools", "reasoning"), DETECTED)
def test_the_format_of_a_template(template: str | None, vocabulary: set[str], tools: Any, reasoning: Any) -> None:
    """XML inside of Hermes' tags was read as JSON; a model's own format was overlooked."""
    assert detect(template, vocabulary) == named(tools, reasoning)


def test_names_that_exist_are_told() -> None:
    """A misspelt name in the configuration told nothing of what it should be."""
    assert named(None, None) == Format()
    with pytest.raises(ValueError, match="no tool format 'hermse': choose one of deepseek, deepseek-v3, hermes, json"):
        named("hermse", None)
    with pytest.raises(ValueError, match=r"no reasoning format 'thunk': .*think"):
        named(None, "thunk")


@by_format
@pytest.mark.parametrize("reasoning", REASONING_FORMATS.values(), ids=lambda r: r.name)
def test_markers_are_all_that_a_tokenizer_may_hide(format: ToolFormat, reasoning: Any) -> None:
    """A marker that is a special token was skipped in decoding, and the call was never seen."""
    markers = Format(format, reasoning).markers
    written = calls.write_calls(format, [("f", "{}")], in_text=True)
    for marker in (*format.triggers, *format.ends, *format.name_ends, reasoning.start, reasoning.end):
        assert marker in markers
        written = written.replace(marker, "")
    assert not any(sign in written for sign in ("<", "[TOOL", "[ARGS", "\uff5c"))
    assert Format().markers == frozenset()
