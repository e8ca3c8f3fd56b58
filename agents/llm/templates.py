r"""`llm.Template`: a prompt as text with role headings and typed slots, read once, where it is made.

    SYSTEM: You know {subject}.          a heading at a line's start begins a message; \USER: is a line of text
    MESSAGES: {history}                  messages, where they stand
    USER: What is in {photo:image}?      {{ and }} are braces

Values become parts after the text was split, and nothing looks through them. templated.py puts functions to templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from diptych.protos.messages import Message, Part, Role, Text

from .errors import DefinitionError, UsageError
from .slots import KINDS, MESSAGES, SlotFault, inserted

HEADINGS = ("SYSTEM", "USER", "ASSISTANT", "MESSAGES")
_CAPITALS = re.compile(r"(\\?)([A-Z]{3,12}):")
_SPACE = re.compile(r"[ \t]*")


@dataclass(frozen=True, slots=True)
class Slot:
    """`line` and `column` count from 1."""

    name: str
    kind: str
    line: int
    column: int


@dataclass(frozen=True, slots=True)
class _Line:
    """Of the template's text, without the indentation that all share; `column` is where its text begins, from 1."""

    text: str
    number: int
    column: int


@dataclass(frozen=True, slots=True)
class _Block:
    """A heading and what stands below it; role MESSAGES: messages that are put in."""

    role: str
    line: int
    pieces: tuple[str | Slot, ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """A template with its values: a prompt."""

    template: Template
    said: tuple[Message, ...]

    def messages(self) -> tuple[Message, ...]:
        """What it says."""
        return self.said


class Template:
    """Raises DefinitionError with line and column where the text cannot be read.

    A slot is `{name}` or `{name:kind}`; kinds: text, image, images, audio, document, parts, lines, json. Text without
    any heading is the user's. Indentation that all lines share is taken away (a heading right behind the quotes does
    not count), and white space around each message's text, but never any of a value's.
    """

    __slots__ = ("_blocks", "name", "slots", "text")

    def __init__(self, text: str, *, name: str = "") -> None:
        if not isinstance(text, str):
            raise DefinitionError(f"llm.Template(...) takes a text, not a {type(text).__name__}")
        self.text = text
        self.name = name
        self._blocks = tuple(_blocks(_lines(text)))
        self.slots: Mapping[str, str] = _kinds_of(self._blocks)

    def __call__(self, /, **values: Any) -> Filled:
        """The prompt with `values` in its slots. Raises UsageError that names the slot, its line and the remedy."""
        return self.fill(values)

    def fill(self, values: Mapping[str, Any], where: str = "") -> Filled:
        """As a call; `where` is told in front of an error."""
        place = f"{where or self.name or 'template'}: "
        missing = [slot for slot in self._slots() if slot.name not in values]
        if missing:
            slot = missing[0]
            raise UsageError(
                f"{place}slot {{{slot.name}}} of line {slot.line} has no value: give {slot.name}=...", slot.name
            )
        for name in values:
            if name not in self.slots:
                there = ", ".join(self.slots) or "none"
                raise UsageError(f"{place}the template has no slot {{{name}}}; its slots: {there}", name)
        said: list[Message] = []
        for block in self._blocks:
            said += _filled(block, values, place)
        if not said:
            raise UsageError(f"{place}there is nothing to ask: no messages were given, and the template says nothing")
        return Filled(self, tuple(said))

    def line_of(self, name: str) -> int:
        """Where slot `name` stands first."""
        return next(slot.line for slot in self._slots() if slot.name == name)

    def _slots(self) -> Iterator[Slot]:
        return (piece for block in self._blocks for piece in block.pieces if isinstance(piece, Slot))

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def _fault(line: int, column: int, words: str) -> NoReturn:
    raise DefinitionError(f"template, line {line}, column {column}: {words}")


def _lines(text: str) -> list[_Line]:
    raw = text.replace("\r\n", "\n").split("\n")
    # Of Template("""USER: ...\n    SYSTEM: ...""") the first line stands behind the quotes, the others in the source.
    counted = raw[1:] if _heading(raw[0]) else raw
    margin = _margin(counted)
    found = []
    for at, one in enumerate(raw):
        cut = 0 if at == 0 and counted is not raw else margin
        found.append(_Line(one[cut:] if one.strip() else "", at + 1, cut + 1))
    return found


def _margin(texts: Sequence[str]) -> int:
    """How many letters of white space all begin with, empty ones aside."""
    indents = [cast("re.Match[str]", _SPACE.match(one))[0] for one in texts if one.strip()]
    if not indents:
        return 0
    first, last = min(indents), max(indents)  # what these two share, all share
    return next((at for at, letter in enumerate(first) if at >= len(last) or last[at] != letter), len(first))


def _heading(text: str) -> str:
    """The heading that a line begins with; empty where it has none."""
    found = _CAPITALS.match(text)
    return found[2] if found is not None and not found[1] and found[2] in HEADINGS else ""


def _blocks(lines: list[_Line]) -> Iterator[_Block]:
    role, begun, body = "", 1, list[_Line]()
    for line in lines:
        heading = _heading(line.text)
        if not heading:
            body.append(_text_line(line))
            continue
        if role:
            yield _block(role, begun, body)
        elif (before := next((one for one in body if one.text.strip()), None)) is not None:
            _fault(before.number, before.column, "text before the first heading: put SYSTEM: or USER: in front of it")
        role, begun, at = heading, line.number, len(heading) + 1
        body = [_Line(line.text[at:].lstrip(" \t"), line.number, _column(line, at))]
    if not any(line.text.strip() for line in body) and not role:
        _fault(1, 1, "there is nothing in it")
    yield _block(role or "USER", begun, body)


def _column(line: _Line, at: int) -> int:
    """Of what stands behind the heading."""
    return line.column + len(line.text) - len(line.text[at:].lstrip(" \t"))


def _text_line(line: _Line) -> _Line:
    """A line without a heading; one that nearly begins with a heading was meant as one, or begins with a backslash."""
    found = _CAPITALS.match(line.text)
    close = "" if found is None else _nearest(found[2])
    if found is None or not close:
        return line
    if found[1]:
        return _Line(line.text[1:], line.number, line.column + 1)
    _fault(
        line.number,
        line.column,
        f"{found[2]}: is no heading; did you mean {close}:? A line of text that begins so is \\{found[2]}:",
    )


def _nearest(word: str) -> str:
    """The heading that `word` is, or nearly is; empty: it is far from all."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, HEADINGS, n=1, cutoff=0.8)), "")


def _block(role: str, begun: int, body: list[_Line]) -> _Block:
    lines = _trimmed(body)
    pieces: list[str | Slot] = []
    for at, line in enumerate(lines):
        if at:
            pieces.append("\n")
        pieces += _pieces(line.text, line.number, line.column)
    if not pieces:
        _fault(begun, 1, f"{role}: has nothing below it")
    if role == MESSAGES:
        return _Block(role, begun, (_only_slot(pieces, begun),))
    for piece in pieces:
        if isinstance(piece, Slot) and piece.kind == "messages":
            _fault(piece.line, piece.column, f"messages stand alone below a heading: MESSAGES: {{{piece.name}}}")
    return _Block(role.lower(), begun, tuple(pieces))


def _trimmed(body: list[_Line]) -> list[_Line]:
    """Without empty lines around it, and without indentation of all that stands below a heading."""
    said = [at for at, line in enumerate(body) if line.text.strip()]
    if not said:
        return []
    stands_alone = said[0] > 0
    lines = body[said[0] : said[-1] + 1]
    lines[-1] = _Line(lines[-1].text.rstrip(), lines[-1].number, lines[-1].column)
    if not stands_alone:
        return lines
    margin = _margin([one.text for one in lines])
    return [_Line(one.text[margin:], one.number, one.column + margin) for one in lines]


def _only_slot(pieces: Sequence[str | Slot], begun: int) -> Slot:
    slot = pieces[0]
    if len(pieces) != 1 or not isinstance(slot, Slot) or slot.kind not in ("text", "messages"):
        _fault(begun, 1, "below MESSAGES: stands one slot alone, such as {history}")
    return Slot(slot.name, "messages", slot.line, slot.column)


def _pieces(text: str, number: int, column: int) -> Iterator[str | Slot]:
    """Of one line: runs of text, and slots."""
    at, run = 0, ""
    while at < len(text):
        two, letter = text[at : at + 2], text[at]
        if two in ("{{", "}}"):
            run, at = run + letter, at + 2
        elif letter == "}":
            _fault(number, column + at, "a } without its {: a brace in the text is written }}")
        elif letter != "{":
            end = min((found for found in (text.find("{", at), text.find("}", at)) if found >= 0), default=len(text))
            run, at = run + text[at:end], end
        else:
            end = text.find("}", at)
            if end < 0:
                _fault(number, column + at, "a { without its } in this line: a brace in the text is written {{")
            if run:
                yield run
            yield _slot(text[at + 1 : end], number, column + at)
            run, at = "", end + 1
    if run:
        yield run


def _slot(inner: str, line: int, column: int) -> Slot:
    name, colon, kind = (one.strip() for one in inner.partition(":"))
    if not name.isidentifier():
        for mark, words in (
            ("!", "values are put in as they are: no conversions"),
            (".", "nothing is looked up in a value: give the field its own slot"),
            ("[", "nothing is looked up in a value: give the item its own slot"),
        ):
            if mark in name and name.partition(mark)[0].strip().isidentifier():
                _fault(line, column, f"{{{inner}}}: {words}")
        _fault(line, column, f"{{{inner}}} is no slot: a name, or name:kind; braces in the text are written {{{{ }}}}")
    if colon and kind not in KINDS:
        _fault(line, column, f"{{{inner}}}: there is no kind {kind!r}; kinds: {', '.join(KINDS)}")
    return Slot(name, kind or "text", line, column)


def _kinds_of(blocks: Sequence[_Block]) -> dict[str, str]:
    first: dict[str, Slot] = {}
    for block in blocks:
        for piece in block.pieces:
            if not isinstance(piece, Slot):
                continue
            known = first.setdefault(piece.name, piece)
            if known.kind != piece.kind:
                _fault(
                    piece.line,
                    piece.column,
                    f"{{{piece.name}}} is of kind {piece.kind} here and of kind {known.kind} in line {known.line}: "
                    f"give each its own name",
                )
    return {name: slot.kind for name, slot in first.items()}


def _filled(block: _Block, values: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    parts: list[Part] = []
    run = ""
    for piece in block.pieces:
        if isinstance(piece, str):
            run += piece
            continue
        try:
            found = inserted(piece.kind, values[piece.name])
        except SlotFault as exc:
            told = f"{{{piece.name}:{piece.kind}}}" if piece.kind not in ("text", "messages") else f"{{{piece.name}}}"
            words = str(exc).replace("{name:", f"{{{piece.name}:")
            raise UsageError(f"{place}slot {told} of line {piece.line} {words}", piece.name) from exc.__cause__
        if block.role == MESSAGES:
            return cast("tuple[Message, ...]", found)
        if isinstance(found, str):
            run += found
            continue
        if run and found:
            parts.append(Text(run))
            run = ""
        parts += cast("tuple[Part, ...]", found)
    if run or not parts:
        parts.append(Text(run))
    return (Message(role=cast("Role", block.role), parts=tuple(parts)),)
