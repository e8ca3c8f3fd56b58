"""The media type of a file: by its first bytes, which readers go by, or by the end of its name, for providers that want
one with every file.
"""

from __future__ import annotations

from urllib.parse import urlsplit

_TYPES = {
    "aac": "audio/aac",
    "aiff": "audio/aiff",
    "bmp": "image/bmp",
    "csv": "text/csv",
    "doc": "application/msword",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "flac": "audio/flac",
    "gif": "image/gif",
    "heic": "image/heic",
    "heif": "image/heif",
    "htm": "text/html",
    "html": "text/html",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "json": "application/json",
    "m4a": "audio/mp4",
    "md": "text/markdown",
    "mov": "video/quicktime",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "mpeg": "video/mpeg",
    "ogg": "audio/ogg",
    "pdf": "application/pdf",
    "png": "image/png",
    "rtf": "application/rtf",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "txt": "text/plain",
    "wav": "audio/wav",
    "webm": "video/webm",
    "webp": "image/webp",
    "xls": "application/vnd.ms-excel",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "xml": "text/xml",
}


def by_name(name: str) -> str:
    """Of a file's name or an address; empty where its end says nothing."""
    tail = urlsplit(name).path if "://" in name else name
    return _TYPES.get(tail.rpartition(".")[2].lower(), "")


_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"%PDF-", "application/pdf"),
    (b"<!DOCTYPE html", "text/html"),
    (b"<!doctype html", "text/html"),
    (b"<html", "text/html"),
    (b"fLaC", "audio/flac"),
    (b"OggS", "audio/ogg"),
    (b"ID3", "audio/mpeg"),
    # A frame of MPEG audio: versions 1, 2 and 2.5 of layer III, with a checksum or without. FF FE begins UTF-16.
    *((b"\xff" + bytes([second]), "audio/mpeg") for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2)),
    (b"\xff\xf1", "audio/aac"),
    (b"\xff\xf9", "audio/aac"),
)
_IN_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}
_IN_AIFF = {b"AIFF": "audio/aiff", b"AIFC": "audio/aiff"}
_BRANDS = {  # of MP4's family; brands that sounds and films share tell nothing
    b"M4A ": "audio/mp4",
    b"avif": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"mif1": "image/heif",
}


def by_bytes(data: bytes) -> str:
    """Of a file's first bytes; empty where they tell nothing, as those of plain texts."""
    for start, media_type in _STARTS:
        if data.startswith(start):
            return media_type
    if data.startswith(b"RIFF"):
        return _IN_RIFF.get(data[8:12], "")
    if data.startswith(b"FORM"):
        return _IN_AIFF.get(data[8:12], "")
    return _BRANDS.get(data[8:12], "") if data[4:8] == b"ftyp" else ""
