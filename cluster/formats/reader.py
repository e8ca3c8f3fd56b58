"""Reads calls, one after another: from a trigger, or from the first character of an answer, to where text goes on.

    trigger [ {"name": "f", "arguments": {...}} , {...} ] end        or        trigger NAME end-of-name {...} end

The parser owns one and hands it the text while calls last. Until a call is certain everything is held, so that it can
still leave as content, as it was written; from then on the arguments go out as they come. Nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from diptych.cluster.formats.call import NO_ARGUMENTS, Call
from diptych.cluster.formats.format import ToolFormat
from diptych.cluster.formats.markers import SPACES, after_spaces, markers_of
from diptych.cluster.formats.output import ARGUMENTS, CONTENT, Output
from diptych.cluster.formats.unescape import unescape, unescape_at
from diptych.cluster.formats.values import NestedReader, StringReader, num_hopeful, search_in_string

MAX_NAME = 256  # characters as written; keys too. More is no call
ARGUMENT_KEYS = ("arguments", "parameters")
# A bare object with another key is no call: an answer in JSON may well have a "name".
BARE_KEYS = ("name", *ARGUMENT_KEYS, "id", "type")

_LITERAL = re.compile(r"""[^ \t\n\r,}\]{\["'<]*""").match
_PLAIN_NAME = re.compile(r"""[^\s{}\[\]<>"'`\uff5c]*""").match
_FENCE_WORD = re.compile("[a-z]*").match

# Reads (text, pos) on to a place. ~place: read up to there, and more text is needed to go on.
State = Callable[[str, int], int]


def is_plain_name(name: str) -> bool:
    """Whether a name can stand in a text without quotes."""
    found = _PLAIN_NAME(name)
    return bool(name) and found is not None and found.end() == len(name) and len(name) <= MAX_NAME


class CallReader:
    """State of the calls of one answer."""

    def __init__(self, format: ToolFormat, tool_names: Collection[str], out: Output) -> None:
        self._format = format
        self._names = frozenset(tool_names)
        self._out = out
        self._stops = markers_of((*format.ends, *format.triggers))
        self._ends = markers_of(format.ends)
        self._name_ends = markers_of(format.name_ends)
        self._inner = markers_of(tuple(t for t in format.triggers if t != format.outer))
        self.is_over = True  # the text goes on as content
        self.had_call = False  # a call stands directly before the place where the text goes on
        self._state: State = self._open
        self._held: list[str] | None = None  # what was read since a call may have begun, until that is certain
        self._rejected = False
        self._bare = False
        self._in_list = False
        self._is_object = True
        self._outer_open = False
        self._closable = False  # brackets and fences may still follow a call
        self._new_call()

    def _new_call(self) -> None:
        self._call = Call(self._out, needs_arguments=self._bare)
        self._key = ""
        self._raw: list[str] = []  # of a name, a key, a literal
        self._is_skipping = False  # the value that is read is not of the arguments
        self._string = StringReader()
        self._nested = NestedReader(self._stops)

    # -- what the parser calls ----------------------------------------------------------------------------------------

    def start(self, held: str, trigger: str | None) -> None:
        """A call may begin here. `held`: white space and the trigger, which is None where an answer begins without."""
        self.is_over = self.had_call = False
        self._rejected = False
        self._bare = trigger is None
        self._in_list = False
        self._outer_open = bool(trigger) and trigger == self._format.outer
        self._new_call()
        self._held = [held]
        self._state = self._open

    def step(self, text: str, pos: int) -> int:
        """Reads on from `pos`."""
        held = self._held
        new = self._state(text, pos)
        if held is not None:
            if self._held is held:
                held.append(text[pos : new if new >= 0 else ~new])
            if self._rejected:
                self._release()
        return new

    def finish(self, rest: str) -> None:
        """The text ends; `rest` is what a state needed more text for."""
        self.is_over = True
        if self._held is not None:
            self._held.append(rest)
            self._release()
            return
        if not self._call.has_ended and not self._is_skipping and self._state in self._values:
            raw = "".join(self._raw) if self._state in (self._literal, self._text_begin) else ""
            self._out.say(ARGUMENTS, NO_ARGUMENTS if raw == "null" else raw + rest)
            rest = ""
        self._call.end()
        self._out.say(CONTENT, rest)

    @property
    def _values(self) -> tuple[State, ...]:
        """The states amid a value."""
        return self._in_nested, self._text_begin, self._text, self._in_string, self._literal

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """It was no call: all of it is content."""
        assert self._held is not None
        for piece in self._held:
            self._out.say(CONTENT, piece)
        self._held = None
        self._rejected = self.had_call = False
        self.is_over = True

    def _bad(self, pos: int) -> int:
        """What stands at `pos` cannot go on a call."""
        if self._held is not None:
            self._rejected = True
        else:
            self._call.end()
            self._to_after(closable=False)
        return pos

    def _begin_if_certain(self) -> None:
        if self._call.begin_if_certain():
            self._held = None
            self.had_call = True

    def _tell(self, piece: str) -> None:
        if not self._is_skipping:
            self._call.tell(piece)

    def _end_arguments(self, pos: int) -> int:
        """The value of a key, or behind a bare name, ended before `pos`."""
        if not self._is_skipping:
            self._call.end_arguments()
        self._is_skipping = False
        if self._is_object:
            self._state = self._after_value
        else:
            self._to_after(closable=True)
        return pos

    def _cut(self, pos: int) -> int:
        """A marker stands at `pos`, amid a call."""
        if self._held is not None:
            return self._bad(pos)
        if not self._call.has_arguments:
            self._call.tell(NO_ARGUMENTS)
        self._call.end()
        self._to_after(closable=True)
        return pos

    # -- from the trigger to the call ---------------------------------------------------------------------------------

    def _open(self, text: str, pos: int) -> int:
        """After a trigger, a list's bracket, or a separator: an object, a list, or a bare name."""
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if self._outer_open:
            found = self._inner.at(text, pos)
            if found:
                self._outer_open = False
                return pos + len(found)
            return ~pos if self._inner.may_begin(text, pos) else self._bad(pos)
        if self._stops.at(text, pos):
            return self._bad(pos)
        if self._stops.may_begin(text, pos):
            return ~pos
        if self._format.has_objects:
            if text[pos] == "{":
                self._is_object = True
                self._state = self._next_key
                return pos + 1
            if text[pos] == "[" and not self._in_list:
                self._in_list = True
                return pos + 1
        if not self._format.name_ends or self._in_list:
            return self._bad(pos)
        self._is_object = False
        self._state = self._plain_name
        return pos

    def _take_plain(self, text: str, pos: int) -> int:
        """Past the characters of a name without quotes, which are kept."""
        found = _PLAIN_NAME(text, pos)
        assert found is not None
        end = found.end()
        if end > pos:
            self._raw.append(text[pos:end])
            if sum(map(len, self._raw)) > MAX_NAME:
                self._rejected = True
        return end

    def _plain_name(self, text: str, pos: int) -> int:
        if (end := self._take_plain(text, pos)) > pos:
            return end
        if not self._raw:
            return self._bad(pos)
        self._state = self._name_end
        return pos

    def _name_end(self, text: str, pos: int) -> int:
        at = after_spaces(text, pos)
        if at > pos:
            return at
        name = "".join(self._raw)
        found = self._name_ends.at(text, pos)
        if found:
            if name == self._format.type_word:
                self._state = self._typed
                return pos + len(found)
            self._named(name)
            self._state = self._id if found == self._format.id_begin else self._fence
            return pos + len(found)
        if text[pos] == "{" and self._format.brace_ends_name:
            self._named(name)
            self._state = self._value
            return pos
        return ~pos if self._name_ends.may_begin(text, pos) else self._bad(pos)

    def _named(self, name: str) -> None:
        self._call.name = name
        self._raw = []
        self._begin_if_certain()

    def _id(self, text: str, pos: int) -> int:
        """The id that a model gave its call; ours is another."""
        at = pos if self._raw else after_spaces(text, pos)
        found = _PLAIN_NAME(text, at)
        assert found is not None
        if found.end() > at:
            self._raw.append(text[at : found.end()])
        elif at == pos:
            self._state = self._id_end
        return found.end()

    def _id_end(self, text: str, pos: int) -> int:
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if text[pos] == "{":
            self._state = self._value
            return pos
        end = self._name_ends.at(text, pos)
        if end:
            self._state = self._fence
            return pos + len(end)
        return ~pos if self._name_ends.may_begin(text, pos) else self._cut_or_bad(text, pos)

    def _typed(self, text: str, pos: int) -> int:
        """After the type and its marker: the name, or the arguments of a tool that is called like the type."""
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if text[pos] == "{":
            self._named("".join(self._raw))
            self._state = self._value
            return pos
        self._raw = []
        self._state = self._typed_name
        return pos

    def _typed_name(self, text: str, pos: int) -> int:
        if (end := self._take_plain(text, pos)) > pos:
            return end
        if not self._raw or text[pos] not in SPACES + "{`<":
            return self._bad(pos)
        self._named("".join(self._raw))
        self._state = self._fence
        return pos

    def _fence(self, text: str, pos: int) -> int:
        at = after_spaces(text, pos)
        if at > pos:
            return at
        self._state = self._value
        if not self._format.is_fenced or text[pos] != "`":
            return pos
        if text.startswith("```", pos):
            self._state = self._fence_word
            return pos + 3
        self._state = self._fence
        return ~pos if len(text) - pos < 3 and not text[pos:].strip("`") else self._bad(pos)

    def _fence_word(self, text: str, pos: int) -> int:
        found = _FENCE_WORD(text, pos)
        assert found is not None
        if found.end() == pos:
            self._state = self._value
        return found.end()

    # -- an object's keys ---------------------------------------------------------------------------------------------

    def _next_key(self, text: str, pos: int) -> int:
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if text[pos] == '"':
            self._raw, self._string = [], StringReader()
            self._state = self._key_text
            return pos + 1
        if text[pos] == "}":
            return self._close_object(pos)
        return self._cut_or_bad(text, pos)

    def _cut_or_bad(self, text: str, pos: int) -> int:
        if self._stops.at(text, pos):
            return self._cut(pos)
        return ~pos if self._stops.may_begin(text, pos) else self._bad(pos)

    def _key_text(self, text: str, pos: int) -> int:
        end, raw = self._short_string(text, pos, BARE_KEYS)
        if raw is not None:
            self._key = unescape(raw)
            self._state = self._colon
            self._rejected = self._bare and not self._call.has_begun and self._key not in BARE_KEYS
        return end

    def _short_string(self, text: str, pos: int, wanted: Collection[str]) -> tuple[int, str | None]:
        """Reads a string up to its quote; gives the inside once it is whole.

        Rejects what is too long and, in a bare object, what cannot become one of `wanted` any more: at the character
        that decides it, wherever the pieces of the text end.
        """
        end = self._string.read(text, pos)
        is_whole = self._string.is_closed
        before = sum(map(len, self._raw))
        self._raw.append(text[pos : end - is_whole])
        raw = "".join(self._raw)
        if self._held is None:  # a call that began is not undone: any key is read, and its value skipped
            self._raw = [raw[: MAX_NAME + 1]]
            return end, raw if is_whole else None
        good = min(MAX_NAME, num_hopeful(raw, wanted) if self._bare else len(raw))
        if good < len(raw):
            self._rejected = True
            return pos + good + 1 - before, None
        return end, raw if is_whole else None

    def _colon(self, text: str, pos: int) -> int:
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if text[pos] != ":":
            return self._cut_or_bad(text, pos)
        if self._key == "name" and self._call.name is None:
            self._state = self._name_value
        else:
            self._state = self._value
            self._is_skipping = self._key not in ARGUMENT_KEYS or self._call.has_arguments
        return pos + 1

    def _name_value(self, text: str, pos: int) -> int:
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if text[pos] != '"':
            return self._bad(pos)
        self._raw, self._string = [], StringReader()
        self._state = self._name_text
        return pos + 1

    def _name_text(self, text: str, pos: int) -> int:
        end, raw = self._short_string(text, pos, self._names)
        if raw is not None:
            name = unescape(raw)
            if not name or (self._bare and name not in self._names):
                self._rejected = True
                return end
            self._state = self._after_value
            self._named(name)
        return end

    def _after_value(self, text: str, pos: int) -> int:
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if text[pos] == ",":
            self._state = self._next_key
            return pos + 1
        if text[pos] == '"':
            self._state = self._next_key
            return pos
        if text[pos] == "}":
            return self._close_object(pos)
        return self._cut_or_bad(text, pos)

    def _close_object(self, pos: int) -> int:
        if self._call.name is None:
            return self._bad(pos)
        if not self._call.has_arguments:
            self._call.has_arguments = True
            self._call.tell(NO_ARGUMENTS)
            self._begin_if_certain()
        self._call.end()
        self._to_after(closable=True)
        return pos + 1

    # -- values -------------------------------------------------------------------------------------------------------

    def _value(self, text: str, pos: int) -> int:
        """The value of the arguments, or one that is skipped."""
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if self._stops.at(text, pos):
            return self._cut(pos)
        if self._stops.may_begin(text, pos):
            return ~pos
        first = text[pos]
        wanted = not self._is_skipping
        self._raw = []
        if first == "{" or (first == "[" and not (wanted and self._bare)):
            self._nested = NestedReader(self._stops)
            self._state = self._in_nested
            if wanted:
                self._call.has_arguments = True
                self._begin_if_certain()
            return pos
        if first == '"':
            self._raw, self._string = ['"'], StringReader()
            self._state = self._text_begin if wanted else self._in_string
            return pos + 1
        if first in ",}" and self._is_object:
            return self._no_arguments(pos)
        if first in "[]{}'`<," or (wanted and self._bare and first != "n"):
            return self._bad(pos)
        self._state = self._literal
        return pos

    def _no_arguments(self, pos: int) -> int:
        """Null, an empty string, or nothing: the arguments are those of a tool that takes none."""
        if not self._is_skipping:
            self._call.has_arguments = True
            self._tell(NO_ARGUMENTS)
            self._begin_if_certain()
        return self._end_arguments(pos)

    def _in_nested(self, text: str, pos: int) -> int:
        """An object or an array up to its closing bracket, or up to a marker outside its strings."""
        nested = self._nested
        end = nested.read(text, pos)
        self._tell(text[pos:end])
        if nested.is_closed:
            return self._end_arguments(end)
        return self._cut(end) if nested.is_cut else ~end

    def _text_begin(self, text: str, pos: int) -> int:
        """The first characters of arguments that are a string: is an object in it?"""
        char, end = text[pos], pos + 1
        if char == "\\":
            found = unescape_at(text, pos)
            if found is None:
                return ~pos
            char, end = found
        if char in SPACES:
            self._raw.append(text[pos:end])
            return end
        if char == '"' and text[pos] == '"':
            return self._no_arguments(end)
        if char == "{":
            self._raw = []
            self._call.has_arguments = True
            self._state = self._text
            self._begin_if_certain()
            return pos
        if self._bare:
            return self._bad(pos)
        self._call.has_arguments = True
        self._begin_if_certain()
        self._tell("".join(self._raw))
        self._state = self._in_string
        return pos

    def _text(self, text: str, pos: int) -> int:
        """The inside of a string, unescaped as it comes."""
        i = pos
        while True:
            found = search_in_string(text, i)
            end = found.start() if found else len(text)
            if end > i:
                self._tell(text[i:end])
            if found is None:
                return end
            if found.group() == '"':
                return self._end_arguments(found.end())
            escape = unescape_at(text, end)
            if escape is None:
                return ~end
            self._tell(escape[0])
            i = escape[1]
            if i >= len(text):
                return i

    def _in_string(self, text: str, pos: int) -> int:
        """A string up to its quote, as written."""
        end = self._string.read(text, pos)
        self._tell(text[pos:end])
        return self._end_arguments(end) if self._string.is_closed else end

    def _literal(self, text: str, pos: int) -> int:
        """A number, true, false, null, or a word that is none of them."""
        found = _LITERAL(text, pos)
        assert found is not None
        end = found.end()
        if not self._is_skipping and not self._call.has_arguments:
            self._raw.append(text[pos:end])
            so_far = "".join(self._raw)
            if end < len(text) and so_far == "null":
                return self._no_arguments(end)
            if end == len(text) and "null".startswith(so_far):
                return end
            if self._bare:
                return self._bad(pos)
            self._call.has_arguments = True
            self._begin_if_certain()
            self._tell(so_far)
            self._raw = []
        else:
            self._tell(text[pos:end])
        return self._end_arguments(end) if end < len(text) else end

    # -- after a call -------------------------------------------------------------------------------------------------

    def _to_after(self, *, closable: bool) -> None:
        self._held = None
        self._closable = closable
        self._state = self._after

    def _after(self, text: str, pos: int) -> int:
        """What may follow a call: closing brackets, fences and markers, which are dropped, and the next object."""
        at = after_spaces(text, pos)
        if at > pos:
            return at
        char = text[pos]
        if self._closable:
            if self._is_object:
                if char == "]" and self._in_list:
                    self._in_list = False
                    return pos + 1
                if char == "}":
                    return pos + 1
                if char == "{" or (char in self._format.separators):
                    self._new_call()
                    self._held = []
                    self._state = self._separator
                    return pos
            elif char == "`" and self._format.is_fenced:
                return pos + 1
        found = self._ends.at(text, pos)
        if found:
            self._closable = False
            return pos + len(found)
        if self._ends.may_begin(text, pos):
            return ~pos
        self.is_over = True
        return pos

    def _separator(self, text: str, pos: int) -> int:
        """Between two objects: another one, or content that begins like it."""
        if text[pos] == "{":
            self._is_object = True
            self._state = self._next_key
            return pos + 1
        at = after_spaces(text, pos)
        if at > pos:
            return at
        if text[pos] in self._format.separators:
            return pos + 1
        return self._bad(pos)
