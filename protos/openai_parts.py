"""The parts of a message's content in OpenAI's form of chat: texts, refusals, images, sounds, files.

Called by openai_messages.py. What is checked is the form; whether a model reads images is asked elsewhere.
"""

from __future__ import annotations

import re

from .messages import Kind, Media, Part, Refusal, Text
from .strict_json import printable
from .wire_checks import a_text, an_object, is_default, one_of, refuse

MAX_URL_CHARS = 8192  # of an address; data in base64 is bounded by the body
MAX_NAME_CHARS = 256
MAX_PARTS = 4096
_DATA = re.compile(r"data:([a-z]+/[a-zA-Z0-9.+-]+);base64,")
_BASE64 = re.compile(r"[A-Za-z0-9+/\n\r]*={0,2}")
_BREAKPOINT: tuple[object, ...] = (None, {"mode": "explicit"})
_SOUNDS = {"wav": "audio/wav", "mp3": "audio/mpeg"}


def read_content(value: object, path: str, *, may_refuse: bool = False) -> tuple[Part, ...]:
    """A content: a string or a list of parts. Raises InvalidRequest naming the path."""
    if isinstance(value, str):
        return (Text(value),)
    if value is None:
        raise refuse(path, "is missing")
    if not isinstance(value, list) or not value:
        raise refuse(path, "must be a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise refuse(path, f"has {len(value)} parts; the limit is {MAX_PARTS}")
    return tuple(_part(part, f"{path}[{i}]", may_refuse=may_refuse) for i, part in enumerate(value))


def _part(part: object, path: str, *, may_refuse: bool) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind != "refusal":
        part = without_breakpoint(part, path)
    match kind:
        case "text" | "refusal" if kind == "text" or may_refuse:
            words = a_text(an_object(part, path, {"type", kind}).get(kind), f"{path}.{kind}", least=0)
            return Text(words) if kind == "text" else Refusal(words)
        case "image_url" if not may_refuse:
            return _image(an_object(part, path, {"type", kind}).get(kind), f"{path}.{kind}", path)
        case "input_audio" if not may_refuse:
            return read_sound(an_object(part, path, {"type", kind}).get(kind), f"{path}.{kind}", path)
        case "file" if not may_refuse:
            return _file(an_object(part, path, {"type", kind}).get(kind), f"{path}.{kind}", path)
    others = "refusal" if may_refuse else "image_url, input_audio or file"
    raise refuse(path, f"must be a part of type text, {others}")


def without_breakpoint(part: dict[str, object], path: str) -> dict[str, object]:
    """A part without its `prompt_cache_breakpoint`, which marks where a prefix ends. Raises InvalidRequest."""
    if not is_default(part.get("prompt_cache_breakpoint"), _BREAKPOINT):
        told = 'may be {"mode": "explicit"}: prefixes are cached without being marked, and for no promised time'
        raise refuse(f"{path}.prompt_cache_breakpoint", told)
    return {name: field for name, field in part.items() if name != "prompt_cache_breakpoint"}


def _image(value: object, path: str, place: str) -> Media:
    given = an_object(value, path, {"url", "detail"})
    detail = given.get("detail")
    if detail is not None:
        one_of(detail, f"{path}.detail", ("auto", "low", "high"))
    return from_url("image", given.get("url"), f"{path}.url", place, detail=detail or "")


def read_sound(value: object, path: str, place: str) -> Media:
    """An object with data and format. Raises InvalidRequest."""
    given = an_object(value, path, {"data", "format"})
    kind = _SOUNDS[one_of(given.get("format"), f"{path}.format", tuple(_SOUNDS))]
    return Media(kind="audio", path=place, media_type=kind, data=a_base64(given.get("data"), f"{path}.data"))


def _file(value: object, path: str, place: str) -> Media:
    given = an_object(value, path, {"file_id", "file_data", "filename"})
    name = "" if given.get("filename") is None else a_text(given["filename"], f"{path}.filename", most=MAX_NAME_CHARS)
    if (given.get("file_id") is None) == (given.get("file_data") is None):
        raise refuse(path, "must have one of file_id and file_data")
    if given.get("file_id") is not None:
        file_id = a_text(given["file_id"], f"{path}.file_id", most=MAX_NAME_CHARS)
        return Media(kind="file", path=place, file_id=file_id, name=name)
    found = from_url("file", given["file_data"], f"{path}.file_data", place)
    return Media(kind="file", path=place, media_type=found.media_type, data=found.data, url=found.url, name=name)


def from_url(kind: Kind, value: object, path: str, place: str, *, detail: str = "") -> Media:
    """Media behind an http(s) address or within a data URL."""
    text = a_text(value, path)
    if (found := _DATA.match(text)) is not None:
        data = a_base64(text[found.end() :], path)
        return Media(kind=kind, path=place, media_type=found[1], data=data, detail=detail)
    if not text.startswith(("https://", "http://")):
        told = printable(text, 40)
        raise refuse(path, f"must be an http(s) address or data:TYPE/SUBTYPE;base64,... ({told})")
    if len(text) > MAX_URL_CHARS:
        raise refuse(path, f"has {len(text)} characters; the limit of an address is {MAX_URL_CHARS}")
    return Media(kind=kind, path=place, url=text, detail=detail)


def a_base64(value: object, path: str) -> str:
    """`value`, which must be base64 of something. Raises InvalidRequest."""
    text = a_text(value, path)
    if not _BASE64.fullmatch(text):
        raise refuse(path, "must be base64")
    return text
