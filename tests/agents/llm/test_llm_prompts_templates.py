"""Guards against templates that read otherwise than they look, and faults that show only when a model is asked."""

from __future__ import annotations

import enum
import textwrap
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from diptych.agents import llm
from diptych.agents.llm.testing.scripted import ScriptedModel
from diptych.agents.llm.tool_context import INJECTED, Context

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
WAV = b"RIFF\0\0\0\0WAVEfmt "
PICTURE, SOUND, PAPER = llm.image(data=PNG), llm.audio(data=WAV), llm.document(data=b"%PDF-1.7")


def said(template: llm.Template, **values: Any) -> list[tuple[str, list[Any]]]:
    messages = template(**values).messages()
    return [(one.role, [part.text if isinstance(part, llm.Text) else part for part in one.parts]) for one in messages]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Hello {x}!", [("user", ["Hello 1!"])]),
        ("SYSTEM: a\nUSER: b {x}", [("system", ["a"]), ("user", ["b 1"])]),
        ("USER:{x}", [("user", ["1"])]),
        ("USER:\t {x}  \n\n", [("user", ["1"])]),
        ("\n    SYSTEM: a\n    USER: b\n      c {x}\n    ", [("system", ["a"]), ("user", ["b\n  c 1"])]),
        ("SYSTEM: a\n    USER: {x}", [("system", ["a"]), ("user", ["1"])]),
        ("SYSTEM:\n    a\n      b {x}\nUSER:\n\n  c\n", [("system", ["a\n  b 1"]), ("user", ["c"])]),
        ("Items:\n  - {x}\n  - b", [("user", ["Items:\n  - 1\n  - b"])]),
        ("a\n\n\nUSERNAME: {x}", [("user", ["a\n\n\nUSERNAME: 1"])]),
        ("a USER: {x}", [("user", ["a USER: 1"])]),
        ("User: {x}\nNOTE: b", [("user", ["User: 1\nNOTE: b"])]),
        ("USER: a\n\\SYSTEM: {x}\n\\USERS: c", [("user", ["a\nSYSTEM: 1\nUSERS: c"])]),
        ("USER: a\n\\NOTE: {x}", [("user", ["a\n\\NOTE: 1"])]),
        ("USER: \\USER: {x}\nb\n  \\USER: c\n  SYSTEM: d", [("user", ["\\USER: 1\nb\n  \\USER: c\n  SYSTEM: d"])]),
        ("\\USER: {x}", [("user", ["USER: 1"])]),
        ("{{{x}}} {{x}} }}{{", [("user", ["{1} {x} }{"])]),
        ("{ x : text } {x}", [("user", ["1 1"])]),
        ("USER: a {x}\r\nASSISTANT: b\r\n", [("user", ["a 1"]), ("assistant", ["b"])]),
        ("\tUSER: a\n\t\tb {x}", [("user", ["a\n\tb 1"])]),
        ("USER: a\x0b\u2028SYSTEM: {x}", [("user", ["a\x0b\u2028SYSTEM: 1"])]),
    ],
)
def test_a_template_reads_as_it_looks(text: str, wanted: object) -> None:
    assert said(llm.Template(text), x=1) == wanted


def test_white_space_of_values_stays() -> None:
    template = llm.Template("USER: {x}\n\nASSISTANT:\n  {y}  \n")
    assert said(template, x=" a \n", y="\n b ") == [("user", [" a \n"]), ("assistant", ["\n b "])]


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("", 1, 1, "nothing in it"),
        (" \n ", 1, 1, "nothing in it"),
        ("USER: {x", 1, 7, "without its }"),
        ("a {x\n}", 1, 3, "without its } in this line"),
        ("a\n  b }", 2, 5, "written }}"),
        ("USER: a\n  \n   b {c} }", 3, 10, "without its {"),
        ("{}", 1, 1, "is no slot"),
        ("{0}", 1, 1, "is no slot"),
        ("{a.b}", 1, 1, "give the field its own slot"),
        ("{a[0]}", 1, 1, "give the item its own slot"),
        ("{a!r}", 1, 1, "no conversions"),
        ("{a:.2f}", 1, 1, "no kind '.2f'; kinds: text, image"),
        ('say {"a": 1}', 1, 5, "braces in the text are written {{ }}"),
        ("  USER: a\n    SYSTEM: {b:foo}", 2, 13, "no kind 'foo'"),
        ("x\nUSER: y", 1, 1, "text before the first heading"),
        ("USER: a\nSYTEM: x", 2, 1, r"did you mean SYSTEM:? A line of text that begins so is \SYTEM:"),
        ("USER: a\n\nASSISTANT:\nUSER: b", 3, 1, "ASSISTANT: has nothing below it"),
        ("USER: a\nSYSTEM:", 2, 1, "SYSTEM: has nothing below it"),
        ("MESSAGES: {a} b", 1, 1, "one slot alone"),
        ("MESSAGES: a", 1, 1, "one slot alone"),
        ("MESSAGES: {a:image}", 1, 1, "one slot alone"),
        ("USER: {x:messages}", 1, 7, "MESSAGES: {x}"),
        ("USER: {x}\nUSER: see {x:image}", 2, 11, "of kind image here and of kind text in line 1"),
    ],
)
def test_a_fault_is_told_with_its_line_and_column(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(llm.DefinitionError) as caught:
        llm.Template(text)
    assert str(caught.value).startswith(f"template, line {line}, column {column}: ")
    assert words in str(caught.value)


def test_a_template_is_a_text() -> None:
    with pytest.raises(llm.DefinitionError, match="takes a text, not a bytes"):
        llm.Template(b"x")  # type: ignore[arg-type]


@settings(max_examples=200)
@given(st.text(st.sampled_from("{}:ax \n\\USER"), max_size=30))
def test_any_text_is_a_template_or_a_fault_with_a_place(text: str) -> None:
    try:
        template = llm.Template(text)
    except llm.DefinitionError as exc:
        line = int(str(exc).split("line ")[1].split(",")[0])
        assert 1 <= line <= text.count("\n") + 1
    else:
        for kind in template.slots.values():
            assert kind == "text"
        assert template(**dict.fromkeys(template.slots, "v")).messages()


def test_reading_is_linear_in_the_text() -> None:
    """100,000 braces, headings and slots: work per letter that grew with the text would take minutes."""
    n = 20_000
    assert len(llm.Template("{{" * n).fill({}).messages()[0].content) == n
    assert len(llm.Template("USER: a\n" * n)().messages()) == n
    assert llm.Template("{x} " * n)(x="v").messages()[0].content == ("v " * n).rstrip()[: 2 * n - 1]


class Colour(enum.Enum):
    RED = "red"


class Book(BaseModel):
    title: str = Field(alias="Title")
    year: date


@dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    ("slot", "value", "wanted"),
    [
        ("{x}", "a", ["a"]),
        ("{x}", 1.5, ["1.5"]),
        ("{x}", Decimal("1.50"), ["1.50"]),
        ("{x}", date(2026, 1, 2), ["2026-01-02"]),
        ("{x}", True, ["True"]),
        ("{x}", Colour.RED, ["red"]),
        ("{x:lines}", ["a", 2, "{x}"], ["a\n2\n{x}"]),
        ("a{x:lines}", [], ["a"]),
        ("{x:json}", {"a": [1, None, "\u00e9{x}"]}, ['{"a": [1, null, "\u00e9{x}"]}']),
        ("{x:json}", Book(Title="Emma", year=date(1815, 12, 23)), ['{"Title": "Emma", "year": "1815-12-23"}']),
        ("{x:json}", [Point(1)], ['[{"x": 1}]']),
        ("{x:json}", "\ud800", ['"\ud800"']),
        ("a {x:image} b", PICTURE, ["a ", PICTURE, " b"]),
        ("{x:images}", [PICTURE, PICTURE], [PICTURE, PICTURE]),
        ("a{x:images}b", (), ["ab"]),
        ("{x:audio}", SOUND, [SOUND]),
        ("{x:document}?", PAPER, [PAPER, "?"]),
        ("a {x:parts}", ["b", PICTURE, llm.Text("c")], ["a ", "b", PICTURE, "c"]),
        ("a {x:parts}", "b", ["a ", "b"]),
    ],
)
def test_a_slot_takes_what_its_kind_says(slot: str, value: object, wanted: list[object]) -> None:
    assert said(llm.Template(f"USER: {slot}"), x=value) == [("user", wanted)]


@pytest.mark.parametrize(
    ("slot", "value", "words"),
    [
        ("{x}", None, 'slot {x} of line 2 is None: give a text, "" for nothing'),
        ("{x}", ["a"], "is a list: write the slot {x:lines} for a line each, or {x:json}"),
        ("{x}", {"a": 1}, "is a dict: give a text or a number, or write the slot {x:json}"),
        ("{x}", b"a", "is a bytes: decode it"),
        ("{x}", PICTURE, "is an image: write the slot {x:image}"),
        ("{x}", SOUND, "is a sound: write the slot {x:audio}"),
        ("{x}", PAPER, "is a document: write the slot {x:document}"),
        ("{x}", llm.Text("a"), "is a Text: write the slot {x:parts}"),
        ("{x:lines}", "abc", "slot {x:lines} of line 2 takes a list of texts, not a str"),
        ("{x:lines}", ["a", None], "holds at [1] None"),
        ("{x:image}", "https://a.example/b.png", "is a text, and takes what llm.image gives: llm.image(url=...)"),
        ("{x:image}", SOUND, "is a sound, and takes what llm.image gives"),
        ("{x:document}", "/etc/passwd", "takes what llm.document gives"),
        ("{x:audio}", None, "takes what llm.audio gives"),
        ("{x:images}", PICTURE, "takes a list of llm.image(...)"),
        ("{x:images}", [PICTURE, "a"], "holds at [1] a text, and takes what llm.image gives"),
        ("{x:parts}", [1], "takes parts: its value[0] is a int"),
        ("{x:json}", object(), "holds a object, which cannot be written as JSON"),
        ("{x:json}", {"a": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_a_value_of_another_kind_is_told_by_slot_line_and_remedy(slot: str, value: object, words: str) -> None:
    with pytest.raises(llm.UsageError) as caught:
        llm.Template(f"SYSTEM: a\nUSER: {slot}")(x=value)
    assert words in str(caught.value)
    assert caught.value.field == "x"


def test_messages_stand_where_their_heading_is() -> None:
    template = llm.Template("SYSTEM: s\nMESSAGES: {history}\nUSER: {q}")
    assert template.slots == {"history": "messages", "q": "text"}
    history = [llm.user("SYSTEM: {q}"), llm.assistant("b")]
    assert template(history=history, q="c").messages() == (llm.system("s"), *history, llm.user("c"))
    assert template(history=(), q="c").messages() == (llm.system("s"), llm.user("c"))
    inner = llm.Template("USER: {a}")(a="{q}")
    assert template(history=inner, q="c").messages() == (llm.system("s"), llm.user("{q}"), llm.user("c"))
    for wrong in ("text", [llm.user("a"), "b"], None, 3):
        with pytest.raises(llm.UsageError, match=r"slot \{history\} of line 2 takes .*llm.user"):
            template(history=wrong, q="c")
    with pytest.raises(llm.UsageError, match="nothing to ask"):
        llm.Template("MESSAGES: {a}")(a=[])


def test_missing_and_unknown_values_are_told() -> None:
    template = llm.Template("{a} and\n{b} and {self}", name="report")
    with pytest.raises(llm.UsageError, match=r"report: slot \{b\} of line 2 has no value: give b=") as caught:
        template(a=1, self=2)
    assert caught.value.field == "b"
    with pytest.raises(llm.UsageError, match=r"report: the template has no slot \{c\}; its slots: a, b, self"):
        template(a=1, b=2, self=3, c=4)


def test_templates_are_values() -> None:
    assert llm.Template("{a}") == llm.Template("{a}") != llm.Template("{b}")
    assert len({llm.Template("{a}"), llm.Template("{a}")}) == 1
    assert repr(llm.Template("{a}")) == "Template('{a}')"


def test_a_function_that_computes_adds_to_its_arguments() -> None:
    @llm.prompt(template=llm.Template("{topic} in {n} words, {style}"))
    def about(topic: str, style: str = "short", *, most: int = 3) -> dict[str, object]:
        if most < 2:
            return {"n": "few"}

        def inner() -> str:
            return "this is no slot"

        return {"n": most * 2, "topic": topic.upper() + inner()[:0]}

    assert about("tea") == (llm.user("TEA in 6 words, short"),)
    assert about("tea", most=1, style="long") == (llm.user("tea in few words, long"),)
    with pytest.raises(TypeError, match="topic"):
        about()  # type: ignore[call-arg]


def test_a_function_may_take_any_slot() -> None:
    @llm.prompt(template=llm.Template("{a} {b}"))
    def both(a: str, **others: str) -> None: ...

    assert both("1", b="2") == (llm.user("1 2"),)
    with pytest.raises(llm.UsageError, match=r"both\(...\): slot \{b\} of line 1 has no value"):
        both("1")


def test_a_context_is_no_slot() -> None:
    @llm.prompt(template=llm.Template("{a}"))
    def one(a: str, context: Context[int] = INJECTED) -> None: ...

    def two(context: Context[int], a: str) -> None: ...

    llm.prompt(template=llm.Template("{a}"))(two)


def test_a_context_may_fill_slots() -> None:
    registry = llm.Registry(environ={})
    registry.add("test", ScriptedModel(["yes"]))

    @llm.call("test/m", template=llm.Template("{who}: {x}"), registry=registry, deps={"who": "ann"})
    def ask(x: str, context: Context[dict[str, str]] = INJECTED) -> dict[str, str]:
        return {"who": context.deps["who"]}

    assert ask("hello").draft.messages == (llm.user("ann: hello"),)


def _idle(topic: str) -> None: ...


def _other(topic: str, tone: str) -> None:
    """It only says what it is."""


async def _later(topic: str, more: int) -> None:
    pass


def _wrong_key(topic: str) -> dict[str, str]:
    return {"tune": "a"}


def _too_few(topic: str) -> dict[str, str]:
    return {"topic": topic}


def _listed(*topic: str) -> None: ...


def _text(photo: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "text", "words"),
    [
        (_idle, "{topic}\n{tone}", "_idle: slot {tone} of the template, line 2, has no parameter (parameters: topic)"),
        (_other, "{topic}", "_other: parameter 'tone' fills no slot of the template (slots: topic)"),
        (_later, "{topic}", "_later: parameter 'more' fills no slot"),
        (_wrong_key, "{topic} {tone}", "_wrong_key: the returned 'tune' fills no slot of the template"),
        (_too_few, "{topic} {tone}", "_too_few: slot {tone} of the template, line 1, has no parameter"),
        (_listed, "{topic}", "_listed: *topic has no name for a slot"),
        (_text, "{photo:image}", "_text: parameter 'photo' is a str, and the template's slot {photo:image} of line 1"),
        (_text, "MESSAGES: {photo}", "takes messages"),
    ],
)
@pytest.mark.parametrize("decorate", [llm.prompt, lambda **given: llm.call("a/b", **given)])
def test_slots_and_parameters_are_compared_where_the_function_is(
    decorate: Any, function: Any, text: str, words: str
) -> None:
    with pytest.raises(llm.DefinitionError) as caught:
        decorate(template=llm.Template(text))(function)
    assert words in str(caught.value)


def test_without_source_slots_are_compared_all_the_same() -> None:
    """In a REPL, or from exec, there is nothing but the code object."""
    names: dict[str, Any] = {}
    exec(textwrap.dedent("def f(topic): ...\ndef g(topic): return {'tone': 1}\ndef h(topic): return topic"), names)
    template = llm.Template("{topic} {tone}")
    with pytest.raises(llm.DefinitionError, match=r"slot \{tone\}"):
        llm.prompt(template=template)(names["f"])
    assert llm.prompt(template=template)(names["g"])("a") == (llm.user("a 1"),)
    with pytest.raises(llm.UsageError, match=r"h\(\) returned a str: with template= a function returns a dict"):
        llm.prompt(template=template)(names["h"])("a")
