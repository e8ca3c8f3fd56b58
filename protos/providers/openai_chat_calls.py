"""The calls in a stream of OpenAI's chat format, put in order: providers send their pieces without an index, with one
for all of them, with ids and names that are empty, missing or repeated, whole, twice, or one call within another.

Called by openai_chat_stream.py. What comes out is one call after the other, each begun and ended once.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Delta, Extras, Reasoning, Refusal
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.wire_checks import JsonObject, compact

MAX_CALLS = 128
MAX_ARGUMENT_CHARS = 8 << 20  # of all calls of an answer
_MOST_LOOKS = 256
_KNOWN = frozenset({"index", "id", "type", "function"})


@dataclass(slots=True)
class _Call:
    """A call as far as it came."""

    key: object  # its index; None: it has none
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    data: JsonObject = field(default_factory=dict)
    number: int = -1  # among those that were told
    num_told: int = 0  # pieces
    num_chars: int = 0
    num_looks: int = 0

    def add(self, text: str) -> None:
        self.pieces.append(text)
        self.num_chars += len(text)

    def is_whole(self) -> bool:
        """Whether the arguments are complete. Not asked for ever: who sends brackets alone would keep us reading."""
        if not self.pieces or not self.pieces[-1].rstrip().endswith("}") or self.num_looks >= _MOST_LOOKS:
            return False
        self.num_looks += 1
        try:
            return isinstance(json.loads("".join(self.pieces)), dict)
        except (ValueError, RecursionError):
            return False

    def has_all_of(self, text: str) -> bool:
        """Whether `text` is the arguments once more, as some providers send them in their last chunk."""
        return (
            len(text) == self.num_chars > 1 and text.endswith("}") and text == "".join(self.pieces) and self.is_whole()
        )


class Calls:
    """The calls of one answer, and what else is said while one is open, which waits until it ends."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._calls: list[_Call] = []
        self._waiting: deque[_Call | Delta] = deque()
        self._open: _Call | None = None
        self._num_told = 0
        self._num_chars = 0

    @property
    def any(self) -> bool:
        """Whether there are calls."""
        return bool(self._calls)

    @property
    def is_open(self) -> bool:
        """Whether a call has begun whose arguments are not complete."""
        return self._open is not None and not self._open.is_whole()

    def say(self, delta: Delta) -> list[Delta]:
        """Something that is no call, in its place."""
        if self._open is not None and not self._waiting and self._open.is_whole():
            return [*self._end(), delta]
        if self._open is None:
            return [delta]
        if isinstance(delta, Content | Reasoning | Refusal) or self._waiting:
            self._waiting.append(delta)
            return []
        return [delta]

    def feed(self, entries: Any) -> list[Delta]:
        """The `tool_calls` of a delta or a message. Raises ProviderFailure (SERVER) for what makes no calls."""
        found: list[Delta] = []
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict):
                found += self._piece(entry)
        return found

    def end(self) -> list[Delta]:
        """The answer is over. Raises ProviderFailure (SERVER) for a call without a name."""
        found = self._end() if self._open is not None else []
        found += self._advance(is_over=True)
        return found

    def _piece(self, entry: JsonObject) -> list[Delta]:
        function = entry.get("function")
        function = function if isinstance(function, dict) else {}
        call_id, name = _text(entry.get("id")), _text(function.get("name"))
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else "" if arguments is None else compact(arguments)
        call = self._of(entry.get("index"), call_id, name, has_text=bool(text))
        if call is None:
            if len(self._calls) >= MAX_CALLS:
                raise _broken(f"the answer makes more than {MAX_CALLS} calls")
            call = _Call(entry.get("index"), call_id, name)
            self._calls.append(call)
            self._waiting.append(call)
        call.id, call.name = call.id or call_id, call.name or name
        for key, value in entry.items():
            if key not in _KNOWN and value is not None:
                call.data[key] = value
        if text and not call.has_all_of(text):
            self._num_chars += len(text)
            if self._num_chars > MAX_ARGUMENT_CHARS:
                raise _broken(f"the arguments of the answer's calls have more than {MAX_ARGUMENT_CHARS} characters")
            if call.number >= 0 and call is not self._open:
                if text.strip():
                    raise _broken("the answer goes on with a call that was over")
                return []
            call.add(text)
        return self._advance()

    def _of(self, index: object, call_id: str, name: str, *, has_text: bool) -> _Call | None:
        """The call that a piece belongs to; None: it begins one."""
        if call_id and (by_id := next((call for call in self._calls if call.id == call_id), None)) is not None:
            return by_id
        if type(index) is int:
            last = next((call for call in reversed(self._calls) if call.key == index), None)
        else:
            last = self._calls[-1] if self._calls else None
        if last is None or (call_id and type(index) is not int):
            return None
        if not name or not last.name:
            return last
        # Providers give all calls one index, or repeat a call's name, or its id anew, with every piece.
        if name != last.name or (call_id and last.id and not last.pieces):
            return None
        return None if has_text and last.is_whole() else last

    def _advance(self, *, is_over: bool = False) -> list[Delta]:
        found: list[Delta] = []
        while True:
            if self._open is not None:
                found += self._told(self._open)
                if not self._waiting or not (is_over or self._open.is_whole()):
                    break
                found += self._end()
            if not self._waiting:
                break
            first = self._waiting[0]
            if isinstance(first, _Call):
                if not first.name:
                    if is_over:
                        raise _broken("the answer makes a call without saying of what function")
                    break
                self._open, first.number = first, self._num_told
                self._num_told += 1
                found.append(CallBegin(first.number, first.name, first.id))
            else:
                found.append(first)
            self._waiting.popleft()
        if is_over and self._open is not None:
            found += self._end()
        return found

    def _told(self, call: _Call) -> list[Delta]:
        fresh = "".join(call.pieces[call.num_told :])
        call.num_told = len(call.pieces)
        return [CallArguments(call.number, fresh)] if fresh else []

    def _end(self) -> list[Delta]:
        call, self._open = self._open, None
        assert call is not None
        found: list[Delta] = [*self._told(call), CallEnd(call.number)]
        return [*found, Extras(self._family, dict(call.data))] if call.data else found


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _broken(words: str) -> ProviderFailure:
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))
