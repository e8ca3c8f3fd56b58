"""The input of a batch, read in pieces: its lines found and checked, without holding more than one piece of it.

Called by run.py, in threads. Knows no store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, Final

from diptych.cluster.store.batches import Line
from diptych.protos.errors import DiptychError
from diptych.protos.openai_batches import BatchLine, WrongLine, parse_line, wrong_body
from diptych.protos.wire_checks import JsonObject

from .settings import BatchSettings

PIECE_LINES: Final = 256
PIECE_BYTES: Final = 2 << 20
_MARK: Final = b"\xef\xbb\xbf"  # that some editors put before a UTF-8 text


@dataclass(slots=True)
class Piece:
    """Some lines of the input. `is_last`: there are no more."""

    lines: list[Line] = field(default_factory=list)
    is_last: bool = False


class InputReader:
    """One pass over an input. `check` tells the model of a body and raises RequestError; `errors` is what was wrong."""

    def __init__(self, source: BinaryIO, endpoint: str, check: Callable[[bytes], str], settings: BatchSettings) -> None:
        self.errors: list[JsonObject] = []
        self.models: set[str] = set()
        self.num_lines = 0  # that hold requests
        self._source = source
        self._endpoint = endpoint
        self._check = check
        self._settings = settings
        self._seen: dict[str, int] = {}
        self._number = 0
        self._position = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all that was read."""
        return self._hash.hexdigest()

    def next_piece(self) -> Piece:
        """The next right lines. The last piece comes early where there are too many errors or lines."""
        piece, size = Piece(), 0
        while len(piece.lines) < PIECE_LINES and size < PIECE_BYTES:
            raw = self._source.readline(self._settings.line_bytes + 1)
            if not raw:
                if not self.num_lines and not self.errors:
                    self._wrong(WrongLine("empty_file", "the input file holds no requests"), None)
                piece.is_last = True
                return piece
            size += len(raw)
            self._number += 1
            start, self._position = self._position, self._position + len(raw)
            self._hash.update(raw)
            try:
                if len(raw) > self._settings.line_bytes:
                    self._skip_line(raw)
                    words = f"the line is longer than {self._settings.line_bytes} bytes"
                    raise WrongLine("line_too_long", words)
                if (line := self._line(raw, start)) is not None:
                    piece.lines.append(line)
            except WrongLine as wrong:
                self._wrong(wrong, self._number)
            most = self._settings.max_lines
            if self.num_lines > most or self._number > 2 * most + 2:  # a blank one behind each is an editor's way
                what = f"{most} requests" if self.num_lines > most else f"{2 * most + 2} lines"
                words = f"there are more than {what} in the file"
                self._wrong(WrongLine("too_many_requests", words), self._number)
                piece.is_last = True
                return piece
            if len(self.errors) >= self._settings.max_errors:
                piece.is_last = True
                return piece
        return piece

    def _line(self, raw: bytes, start: int) -> Line | None:
        if self._number == 1 and raw.startswith(_MARK):
            raw, start = raw[len(_MARK) :], start + len(_MARK)
        if not raw.strip():
            return None
        self.num_lines += 1
        request = parse_line(raw, self._endpoint)
        self._check_unique(request)
        try:
            model = self._check(request.body)
        except DiptychError as exc:
            raise wrong_body(exc) from None
        if len(self.models) < 2:
            self.models.add(model)
        return Line(self._number, request.custom_id, start, len(raw), 0)

    def _check_unique(self, request: BatchLine) -> None:
        before = self._seen.setdefault(request.custom_id, self._number)
        if before != self._number:
            words = f"custom_id is that of line {before}; each request needs one of its own"
            raise WrongLine("duplicate_custom_id", words, "custom_id")

    def _skip_line(self, raw: bytes) -> None:
        while raw and not raw.endswith(b"\n"):
            raw = self._source.readline(PIECE_BYTES)
            self._hash.update(raw)
            self._position += len(raw)

    def _wrong(self, wrong: WrongLine, line: int | None) -> None:
        self.errors.append(wrong.told(line))
