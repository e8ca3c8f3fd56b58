"""Images and documents as parts: from bytes, a file, or an address; checked by their first bytes, named in errors.

Ask a model that sees: python images.py anthropic/claude-sonnet-4-5
"""

from __future__ import annotations

import os
import struct
import sys
import zlib

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
NEEDS_SCRIPT = True  # the small model reads texts alone
SCRIPT: list[object] = ["A red square.", "Both are red."]


def red_square(size: int) -> bytes:
    """A PNG."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff\0\0" * size) * size)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@llm.call(MODEL)
def describe(photo: llm.Media) -> list[str | llm.Media]:
    return ["What is in this picture?", photo]


@llm.call(
    MODEL,
    template=llm.Template("SYSTEM: Be brief.\nUSER: {photos:images}Compare them by these notes: {notes:document}"),
)
def compare(photos: list[llm.Media], notes: llm.Media) -> None: ...


def main() -> None:
    square = llm.image(data=red_square(16), detail="low")
    print(describe(square).text)
    notes = llm.document(data=b"Look at the colour alone.", name="notes.txt")
    print(compare([square, llm.image(data=red_square(32))], notes).text)

    try:
        llm.image(data=b"%PDF-1.7 ...")
    except llm.UsageError as error:
        print("told before anything is sent:", error)


if __name__ == "__main__":
    main()
