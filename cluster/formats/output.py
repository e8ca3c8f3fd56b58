"""Deltas of one answer on their way out of the parser. They know neither formats nor wire shapes."""

from __future__ import annotations

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Delta, Reasoning

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
