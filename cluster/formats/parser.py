"""One answer's text to typed deltas, as it comes. The router feeds it what the detokenizer lets out.

    begin -> [reasoning -> begin] -> content <-> calls (reader.py)

What comes out depends on the text alone, never on where its pieces end; and nothing is held that is decided.
It knows neither tokens nor stop strings nor what the tools are.
"""

from __future__ import annotations

from collections.abc import Collection

from diptych.cluster.formats.format import Format
from diptych.cluster.formats.markers import MAX_DROPPED_SPACES, SPACES, after_spaces, before_spaces, markers_of
from diptych.cluster.formats.output import CONTENT, REASONING, Output
from diptych.cluster.formats.reader import CallReader, State
from diptych.protos.deltas import Content, Delta


class OutputParser:
    """State of one answer.

    `in_reasoning`: the prompt ended inside the reasoning, so the text begins in it. `tool_names`: the tools offered;
    with None, or none, all that looks like a call is content. ValueError: `in_reasoning` without a reasoning format.
    """

    def __init__(
        self, format: Format, *, in_reasoning: bool = False, tool_names: Collection[str] | None = None
    ) -> None:
        if in_reasoning and format.reasoning is None:
            raise ValueError("in_reasoning needs a format with reasoning markers, and this one has none")
        self._out = Output()
        self._rest = ""  # shorter than a marker and the white space before it
        self._is_finished = False
        self._drops_spaces = in_reasoning  # white space here belongs to the marker before it
        reasoning = format.reasoning
        self._start = markers_of((reasoning.start,) if reasoning else ())
        self._end = markers_of((reasoning.end,) if reasoning else ())
        tools = format.tools if tool_names else None
        self._triggers = markers_of(tools.triggers if tools else ())
        self._bare = tools.bare if tools else ""
        self._reader = CallReader(tools, tool_names, self._out) if tools and tool_names else None
        self._holds_spaces = bool(tools and tools.triggers)
        self._state: State = self._begin
        if in_reasoning:
            self._state = self._lead
        elif reasoning is None and not self._bare:
            self._state = self._content

    @property
    def is_reasoning(self) -> bool:
        """Whether what was fed ends inside the reasoning."""
        return self._state in (self._lead, self._reasoning)

    @property
    def may_reason(self) -> bool:
        """Whether reasoning goes on or may still begin."""
        return self.is_reasoning or (self._state == self._begin and self._start is not markers_of(()))

    def feed(self, text: str) -> list[Delta]:
        """What the next piece of the text settles; neighbours of one kind are joined. Not after `finish`."""
        assert not self._is_finished, "fed after the end"
        if not text:
            return []
        if self._rest:
            text = self._rest + text
            self._rest = ""
        elif self._state == self._content and not self._drops_spaces and self._is_plain(text):
            return [Content(text)]
        pos, size = 0, len(text)
        while pos < size:
            pos = self._state(text, pos)
            if pos < 0:
                self._rest = text[~pos:]
                break
        return self._out.take()

    def finish(self) -> list[Delta]:
        """The end of the text: what was held back, and the end of a call that is open. Empty when called again."""
        if self._is_finished:
            return []
        self._is_finished = True
        if self._state == self._calls:
            assert self._reader is not None
            self._reader.finish(self._rest)
        elif self._state in (self._lead, self._reasoning):
            self._out.say(REASONING, self._rest)
        else:
            self._out.say(CONTENT, self._rest)
        self._rest = ""
        return self._out.take()

    def _is_plain(self, text: str) -> bool:
        return not (self._holds_spaces and text[-1] in SPACES) and self._triggers.search_first(text) is None

    def _begin(self, text: str, pos: int) -> int:
        """The first characters of the answer, or of what follows the reasoning."""
        at = after_spaces(text, pos)
        if self._drops_spaces and at > pos:
            return at
        if at - pos <= MAX_DROPPED_SPACES:
            if at == len(text) or self._start.may_begin(text, at):
                return ~pos
            start = self._start.at(text, at)
            if start:
                self._drops_spaces = True
                self._state = self._lead
                return at + len(start)
            if text[at] in self._bare:
                assert self._reader is not None
                self._reader.start(text[pos:at], None)
                self._state = self._calls
                return at
        self._state = self._content
        return pos

    def _lead(self, text: str, pos: int) -> int:
        """The first characters of the reasoning: white space, and a start marker that the prompt had already."""
        at = after_spaces(text, pos)
        if at > pos:
            return at
        start = self._start.at(text, pos)
        if start:
            return pos + len(start)
        if self._start.may_begin(text, pos):
            return ~pos
        self._state = self._reasoning
        return pos

    def _reasoning(self, text: str, pos: int) -> int:
        found = self._end.search(text, pos)
        marker = found.start() if found else self._end.held_from(text, pos)
        cut = before_spaces(text, pos, marker)
        self._out.say(REASONING, text[pos:cut])
        if found is None:
            return ~cut
        self._start = markers_of(())  # one block of reasoning: a later marker is text
        self._drops_spaces = True
        self._state = self._begin
        return found.end()

    def _content(self, text: str, pos: int) -> int:
        if self._drops_spaces:
            at = after_spaces(text, pos)
            if at > pos:
                return at
            self._drops_spaces = False
        found = self._triggers.search(text, pos)
        marker = found.start() if found else self._triggers.held_from(text, pos)
        cut = before_spaces(text, pos, marker) if self._holds_spaces else marker
        self._out.say(CONTENT, text[pos:cut])
        if found is None:
            return ~cut
        assert self._reader is not None
        self._reader.start(text[cut : found.end()], found.group())
        self._state = self._calls
        return found.end()

    def _calls(self, text: str, pos: int) -> int:
        reader = self._reader
        assert reader is not None
        pos = reader.step(text, pos)
        if reader.is_over:
            self._drops_spaces = reader.had_call
            self._state = self._content
        return pos
