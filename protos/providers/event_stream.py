"""A text/event-stream taken apart into its events, whatever pieces it comes in, by the rules of the WHATWG.

The providers' client feeds what it reads. `id` and `retry` mean nothing here; what the data say, decoders know.
"""

from __future__ import annotations

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .codec import ServerEvent

MAX_EVENT_BYTES = 4 << 20  # an image in base64 fits; nothing honest is larger
_BOM = b"\xef\xbb\xbf"


class EventStream:
    """One stream. An event that the stream's end cuts off is never told."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of the line that has not ended
        self._data: list[bytes] = []
        self._event = b""
        self._size_bytes = 0  # of both lists
        self._after_cr = False
        self._is_first_line = True
        self._is_between = False  # nothing is left of what came

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """The events that are complete with `piece`. Raises ProviderFailure (SERVER) for one of more than 4 MiB, after
        which the stream is not to be fed again.
        """
        if self._after_cr and piece.startswith(b"\n"):
            piece, self._after_cr = piece[1:], False
        if not piece:
            return []
        self._after_cr = piece.endswith(b"\r")
        if self._is_between and _is_one_event(piece):
            return [ServerEvent(piece[6:-2].decode("utf-8", "replace"))]
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = piece.split(b"\n")
        if self._rest and len(lines) > 1:
            self._rest.append(lines[0])
            lines[0] = b"".join(self._rest)
            self._size_bytes -= len(lines[0]) - len(self._rest[-1])
            self._rest = []
        rest = lines.pop()
        found = [event for line in lines if (event := self._line(line)) is not None]
        if rest:
            self._rest.append(rest)
            self._grow(len(rest))
        self._is_between = not (self._rest or self._data or self._event or self._is_first_line)
        return found

    def _line(self, line: bytes) -> ServerEvent | None:
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BOM)
        if line.startswith(b"data:"):
            value = line[6:] if line.startswith(b" ", 5) else line[5:]
            self._data.append(value)
            self._grow(len(value) + 1)
            return None
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        if name == b"event":
            self._event = value.removeprefix(b" ")
            if len(self._event) > MAX_EVENT_BYTES:
                raise _too_large()
        elif name == b"data":
            self._data.append(b"")
            self._grow(1)
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._size_bytes = [], b"", 0
        if not data:
            return None
        text = data[0] if len(data) == 1 else b"\n".join(data)
        return ServerEvent(text.decode("utf-8", "replace"), event.decode("utf-8", "replace"))

    def _grow(self, size_bytes: int) -> None:
        self._size_bytes += size_bytes
        if self._size_bytes > MAX_EVENT_BYTES:
            raise _too_large()


def _is_one_event(piece: bytes) -> bool:
    """As nearly every provider sends nearly every piece."""
    ends_at = len(piece) - 2
    is_framed = piece.startswith(b"data: ") and piece.endswith(b"\n\n") and ends_at < MAX_EVENT_BYTES
    return is_framed and piece.find(b"\n") == ends_at and b"\r" not in piece


def _too_large() -> ProviderFailure:
    words = f"the answer's stream holds an event of more than {MAX_EVENT_BYTES >> 20} MiB"
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))
