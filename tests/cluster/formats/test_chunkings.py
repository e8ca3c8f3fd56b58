"""What comes out depends on the text alone: any chunking, any place of truncation, any garbage; in linear time.

Guards against answers that differ with the network's timing, text that is held or lost, and one that stops a router.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.formats.calls import write_call, write_calls
from diptych.cluster.formats.format import REASONING_FORMATS, TOOL_FORMATS, Format, ToolFormat
from diptych.cluster.formats.parser import OutputParser
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Delta, Reasoning

FORMATS = list(TOOL_FORMATS.values())
THINK = REASONING_FORMATS["think"]
TOOLS = ("f", "g")
NESTED = '{"a": [{"b": {"c": [1, "]}", {}]}}, null], "s": "<tool_call>{[TOOL_CALLS]<|python_tag|></think>"}'
UNICODE = '{"s": "\\u00e9\\ud83d\\ude00 \u00e9 \U0001f600 \\\\ \\" \\n \u4f60"}'

by_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def outputs(format: ToolFormat) -> list[str]:
    """Thirty answers and more: whole, cut, malformed, and nearly calls."""
    one = write_call(format, "f", '{"a": 1}')
    two = write_calls(format, [("f", NESTED), ("g", UNICODE)])
    later = write_calls(format, [("f", "{}"), ("g", '{"a": 1}')], in_text=True)
    trigger = format.triggers[0] if format.triggers else "["
    think = "<think>\nhm, <tool_call>{}\n\n</think>\n\n"
    half = (format.name_ends or format.triggers or ("[{",))[0]
    return [
        *("Hello, world.\n", "caf\u00e9 \U0001f600 1 < 2 [3] {4}", "  \n", "{", "[[{", '{"name": "x"}', "<think>"),
        *(one, two, later, think + "ok", think + one, think + "Sure.\n\n" + later, later + "\nDone.\n"),
        *(write_call(format, "f", UNICODE), write_call(format, "f", '"{\\"a\\": \\"\\\\n\\\\u00e9\\"}"')),
        *(write_call(format, "f", value) for value in ("{}", "null", '""', "[1]", "17", '"Paris"', "nul")),
        *(write_call(format, "h", "{}"), write_call(format, "f", '{"a": 1,, b: }'), write_call(format, "f", '{"a')),
        *(two[: len(two) // 3], two[: len(two) // 2], two[:-1], later[:-2]),
        *(one.replace('"', "'"), one.replace(":", "")),
        *(one.replace("{", "", 1), one.replace("}", "}}"), one.replace('"f"', '"f", "name": "g"'), half + one + half),
        *(trigger, trigger + "\n" + trigger, trigger[:-1] + one, trigger + "half " + one, one + ", " + one + "; {"),
        write_call(format, "f", '{"s": "' + "long " * 40 + '"}'),
    ]


def run(format: ToolFormat, pieces: Sequence[str], **options: Any) -> list[Delta]:
    """The deltas, neighbours of one kind joined."""
    parser = OutputParser(Format(format, THINK), tool_names=TOOLS, **options)
    return joined([*(delta for piece in pieces for delta in parser.feed(piece)), *parser.finish()])


def joined(deltas: list[Delta]) -> list[Delta]:
    out: list[Delta] = []
    for delta in deltas:
        match out[-1] if out else None, delta:
            case Content(before), Content(text):
                out[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                out[-1] = Reasoning(before + text)
            case CallArguments(index, before), CallArguments(_, text):
                out[-1] = CallArguments(index, before + text)
            case _:
                out.append(delta)
    return out


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def is_in_order(deltas: list[Delta]) -> bool:
    """Each call is begun once, with the next index, ended once, and has its arguments between."""
    names = "".join({CallBegin: "b", CallArguments: "a", CallEnd: "e"}.get(type(delta), "t") for delta in deltas)
    indices = [delta.index for delta in deltas if isinstance(delta, CallBegin)]
    return re.fullmatch("(t|ba*e)*", names) is not None and indices == list(range(len(indices)))


@by_format
def test_ten_thousand_chunkings(format: ToolFormat) -> None:
    """A marker, an escape or a name that was split between two chunks was taken for something else."""
    table = outputs(format)
    assert len(table) >= 30
    rng = random.Random(format.name)
    wholes = [run(format, [text]) for text in table]
    for text, whole in zip(table, wholes, strict=True):
        assert is_in_order(whole)
        assert run(format, list(text)) == whole, text
    for round_ in range(10_000):
        which = round_ % len(table)
        text = table[which]
        places = [rng.randrange(len(text) + 1) for _ in range(rng.choice((1, 1, 2, 3, 8)))]
        assert run(format, cut(text, places)) == wholes[which], (text, places)


@by_format
def test_an_answer_cut_anywhere_keeps_its_text(format: ToolFormat) -> None:
    """A call that `max_tokens` cut off raised, or its text was nowhere."""
    for text in outputs(format):
        for size in range(len(text)):
            deltas = run(format, [text[:size]])
            assert is_in_order(deltas)
            if all(isinstance(delta, Content) for delta in deltas) and "<think>" not in text:
                assert "".join(delta.text for delta in deltas if isinstance(delta, Content)) == text[:size]


@by_format
def test_only_what_is_undecided_is_held(format: ToolFormat) -> None:
    """Text waited for more than a marker's length, so a stream stood still."""
    most = max(map(len, (*format.markers, THINK.end))) + 16
    texts = [
        "a" + " plain [text] < with {half} markers <tool [TOOL <| </ \n\n" * 4,
        "<think>" + "long </thin reasoning \n" * 10,
        write_call(format, "f", '{"s": "' + 'x <tool_call> \\\\ \\" ' * 20 + '", "t": [' + "[1], " * 40),
        write_call(format, "f", '"{\\"s\\": \\"' + "x \\\\n \\u00e9 " * 20),
    ]
    for text in texts:
        parser = OutputParser(Format(format, THINK), tool_names=TOOLS)
        told = 0
        for size, char in enumerate(text, 1):
            told += length(parser.feed(char))
            if size > 100:  # behind the head of a call
                assert length(run(format, [text[:size]])) - told <= most, text[:size]


def length(deltas: list[Delta]) -> int:
    return sum(len(delta.text) for delta in deltas if not isinstance(delta, CallBegin | CallEnd))


FRAGMENTS = [
    *('{"name": "f", "arguments": ', '{"name":"g","parameters":{}}', '"name"', '"f"', '"arguments":', '"id":', "g"),
    *("{", "}", "[", "]", '"', "\\", ",", ":", ";", " ", "\n", "'", "null", "12", "\\u00e9", "\\ud83d", "\\n", "```"),
    *("text ", "\u00e9", "\xa0", " " * 17, "x" * 257, "function", "<think>", "</think>", "<", "</"),
]


@st.composite
def garbage(draw: st.DrawFn) -> tuple[ToolFormat, str, list[int]]:
    format = draw(st.sampled_from(FORMATS))
    markers = sorted(format.markers)
    parts = st.sampled_from([*FRAGMENTS, *markers, *(m[: len(m) // 2] for m in markers), write_call(format, "f", "{}")])
    text = draw(st.sampled_from(["", *format.triggers])) + "".join(draw(st.lists(parts, max_size=20)))
    return format, text, draw(st.lists(st.integers(0, len(text)), max_size=6))


@given(garbage(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_garbage_at_any_chunking(case: tuple[ToolFormat, str, list[int]], in_reasoning: bool) -> None:
    """Decisions that hang on the end of a chunk, and garbage that raises."""
    format, text, places = case
    whole = run(format, [text], in_reasoning=in_reasoning)
    assert is_in_order(whole)
    assert run(format, cut(text, places), in_reasoning=in_reasoning) == whole
    assert run(format, list(text), in_reasoning=in_reasoning) == whole
    if all(isinstance(delta, Content) for delta in whole) and not in_reasoning and "<think>" not in text:
        assert "".join(delta.text for delta in whole if isinstance(delta, Content)) == text


SIZE = 65_536
HOSTILE = {
    "nested objects": '{"a":',
    "nested arrays": "[",
    "closing": "}",
    "quotes": '"',
    "backslashes": "\\",
    "escapes": '\\"',
    "half surrogates": "\\ud83d",
    "half markers": "<tool_cal",
    "half deepseek": "<\uff5ctool",
    "half mistral": "[TOOL_CALLS",
    "angles": "<",
    "white space": " ",
    "backtracking": "aaaa!",
    "evaluation": "__import__('os').system('x')",
    "commas": ",",
    "keys": '"a":1,',
    "plain": "word ",
}


def run_only(format: ToolFormat, pieces: Sequence[str]) -> None:
    """A parser's work, and nothing of a test's."""
    parser = OutputParser(Format(format, THINK), tool_names=TOOLS)
    for piece in pieces:
        parser.feed(piece)
    parser.finish()


def lines_run(format: ToolFormat, pieces: Sequence[str]) -> int:
    """How many lines of Python a parser runs for a text: what it takes, on a machine of any speed."""
    count = 0

    def line(*_: object) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return line

    before = sys.gettrace()
    sys.settrace(line)
    try:
        run_only(format, pieces)
    finally:
        sys.settrace(before)
    return count


def bounded(format: ToolFormat, text: str, *, piece: int, room: int = 4) -> None:
    """So many lines for each character and each piece, however long the text is. Lines do not see what is quadratic
    inside one, a search or a pattern: that is what the CPU time is for, 50 ms per 64 KiB and `room` times that.
    """
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    assert lines_run(format, pieces) <= 32 * len(text) + 80 * len(pieces) + 1000
    limit_s = 0.05 * room * len(text) / SIZE
    spent = []
    for _ in range(3):
        begin_s = time.process_time()
        run_only(format, pieces)
        spent.append(time.process_time() - begin_s)
        if spent[-1] <= limit_s:
            return
    pytest.fail(f"{min(spent):.3f} s for {len(text)} characters, limit {limit_s:.3f} s")


@by_format
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_text_takes_linear_time(format: ToolFormat, what: str) -> None:
    """One answer of brackets held the router's thread for minutes, or overflowed its stack."""
    bait = HOSTILE[what]
    body = bait * (SIZE // len(bait))
    call = write_call(format, "f", "{\x00").partition("\x00")[0]
    opened = format.triggers[0] if format.triggers else "["
    for text in (body, call + body, call + '"' + body, opened + body, opened + '{"arguments": {"x": ' + body):
        bounded(format, text, piece=SIZE)
        bounded(format, text[: SIZE // 16], piece=1, room=16)


@by_format
def test_a_hundred_thousand_levels_and_calls(format: ToolFormat) -> None:
    """Nothing recurses by the depth of a text, and many calls cost what one costs each."""
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    deltas = run(format, [write_call(format, "f", deep)])
    assert joined(deltas) == [CallBegin(0, "f"), CallArguments(0, deep), CallEnd(0)]
    bounded(format, write_calls(format, [("f", "{}")] * 1000), piece=4)


@by_format
def test_single_characters_of_an_ordinary_answer(format: ToolFormat) -> None:
    """65,536 chunks of one character cost more in a loop over what was held than in all else."""
    bounded(format, "<think>" + "why? " * 6000 + "</think>" + "Because. " * 3900, piece=1)
