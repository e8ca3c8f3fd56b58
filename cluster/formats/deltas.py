"""What a model's text turns into: the deltas of one answer, in the order of the text.

The parser makes them; the API writes them as chunks. They know neither formats nor wire shapes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning, without its markers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call `index` (from 0) of the answer begins; it is a call of the tool `name`."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the JSON text of a call's arguments, as the model wrote it; it need not be valid JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """No more comes of call `index`. Each CallBegin has exactly one, and no call lies inside another."""

    index: int


Delta = Content | Reasoning | CallBegin | CallArguments | CallEnd

CONTENT, REASONING, ARGUMENTS = range(3)


class Output:
    """Deltas on their way out: neighbouring pieces of one kind leave as one delta."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._kind = CONTENT
        self._pieces: list[str] = []
        self._num_calls = 0

    def say(self, kind: int, text: str) -> None:
        """Adds text of a kind; arguments belong to the call that began last."""
        if not text:
            return
        if kind != self._kind and self._pieces:
            self._close()
        self._kind = kind
        self._pieces.append(text)

    def begin_call(self, name: str) -> None:
        """The next call begins."""
        self._close()
        self._deltas.append(CallBegin(self._num_calls, name))
        self._num_calls += 1

    def end_call(self) -> None:
        """The call that began last is over."""
        self._close()
        self._deltas.append(CallEnd(self._num_calls - 1))

    def take(self) -> list[Delta]:
        """Everything since the last time."""
        if self._pieces:
            self._close()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _close(self) -> None:
        if not self._pieces:
            return
        text = self._pieces[0] if len(self._pieces) == 1 else "".join(self._pieces)
        self._pieces.clear()
        if self._kind == CONTENT:
            self._deltas.append(Content(text))
        elif self._kind == REASONING:
            self._deltas.append(Reasoning(text))
        else:
            self._deltas.append(CallArguments(self._num_calls - 1, text))
