"""A multipart form with one file and a few short fields, parsed as it arrives: the file's bytes are handed on.

Called by files.py. Stands on python-multipart's parser, whose errors become InvalidRequest here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_files import read_name
from diptych.protos.strict_json import printable

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS: Final = 16
FIELD_BYTES: Final = 1024
# Boundaries, headers and fields of an honest form, beside the file.
FORM_BYTES: Final = 64 << 10
FILE: Final = "file"


class FileForm:
    """One form. `fields` and `name`, the file's, are complete once it `is_over`."""

    def __init__(self, content_type: str) -> None:
        """Raises InvalidRequest for another type than multipart/form-data, or one without a boundary."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise InvalidRequest("send the file as a form: the header content-type: multipart/form-data; boundary=...")
        self.fields: dict[str, str] = {}
        self.name: str | None = None
        self.is_over = False
        self._headers: dict[bytes, bytes] = {}
        self._header = b""
        self._value = b""
        self._field: str | None = None  # of the part that is read now; None: it is the file
        self._text = bytearray()
        self._out: list[bytes] = []
        self._parts = 0
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begins,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._part_ends,
            "on_end": self._ends,
        }
        try:
            self._parser = MultipartParser(options.get(b"boundary", b""), callbacks)
        except FormParserError as exc:
            raise InvalidRequest(f"the form's boundary cannot be used: {exc}") from None
        if not options.get(b"boundary"):
            raise InvalidRequest("the header content-type names no boundary of the form")

    def feed(self, data: bytes) -> list[bytes]:
        """The bytes of the file in this piece of the form. Raises InvalidRequest."""
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise InvalidRequest(f"the form cannot be read: {printable(str(exc), 200)}") from None
        out, self._out = self._out, []
        return out

    def finish(self) -> str:
        """The form has ended; the name of its file. Raises InvalidRequest."""
        if not self.is_over:
            raise InvalidRequest("the form ends before its last boundary")
        if self.name is None:
            raise InvalidRequest("file is missing: send a part `file` with a filename", FILE)
        return self.name

    def _part_begins(self) -> None:
        self._headers.clear()
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise InvalidRequest(f"the form has more than {MAX_FIELDS} parts")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _headers_end(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequest("a part of the form has no header content-disposition: form-data with a name")
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"7bit", b"8bit"):
            raise InvalidRequest("a part of the form has a content-transfer-encoding; send it as it is")
        name = _text(options[b"name"], "the name of a part")
        if name == FILE:
            if b"filename" not in options:
                raise InvalidRequest("file has no name: send a filename with the contents", FILE)
            if self.name is not None:
                raise InvalidRequest("file is given twice; send one at a time", FILE)
            self.name = read_name(_text(options[b"filename"], "the filename"))
            self._field = None
            return
        if b"filename" in options:
            raise InvalidRequest(f"{printable(name)} is a file; there is one, in the part `file`", printable(name))
        if name in self.fields:
            raise InvalidRequest(f"{printable(name)} is given twice", printable(name))
        self._field = name
        self._text.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._out.append(data[start:end])
            return
        if len(self._text) + end - start > FIELD_BYTES:
            name = printable(self._field)
            raise InvalidRequest(f"{name} has more than {FIELD_BYTES} bytes", name)
        self._text += data[start:end]

    def _part_ends(self) -> None:
        if self._field is not None:
            self.fields[self._field] = _text(bytes(self._text), printable(self._field))

    def _ends(self) -> None:
        self.is_over = True


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what} is not UTF-8") from None
