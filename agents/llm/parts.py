"""Parts of prompts: texts, images, sounds and documents, from an address, a file or bytes.

What a file is, its first bytes decide. An address is only looked at here: who answers reads it, or upstream.py fetches
it, guarded. conversation.py puts parts into messages.
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from diptych.protos.messages import Kept, Kind, Media, Text
from diptych.protos.providers.media_types import by_bytes, by_name

from .errors import UsageError

Detail = Literal["auto", "low", "high"]
KeptPart = TypeVar("KeptPart", Text, Media)
MAX_BYTES = 20 << 20  # of one file, as of one that is fetched
MAX_NAME_CHARS = 256
_VERBS: dict[Kind, str] = {"image": "llm.image", "audio": "llm.audio", "file": "llm.document"}
_NOUNS: dict[Kind, str] = {"image": "image", "audio": "sound", "file": "document"}
_OFFICE = {  # by a member that each such archive has
    "word/document.xml": "docx",
    "xl/workbook.xml": "xlsx",
}
_MOST_LIST_BYTES = 1 << 20
_USER = re.compile(r"://[^/?#]*@")
_OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def text(words: str, *, keep: Kept = "") -> Text:
    """A text as a part, for where it is to be kept: see `kept`."""
    if not isinstance(words, str):
        raise UsageError(f"llm.text(...) takes a text, not a {type(words).__name__}", "words")
    return Text(words, kept=_keep(keep, "llm.text"))


def image(
    *,
    url: str | None = None,
    path: str | os.PathLike[str] | None = None,
    data: bytes | None = None,
    detail: Detail = "auto",
    keep: Kept = "",
    limit_bytes: int = MAX_BYTES,
) -> Media:
    """An image from exactly one of an http(s) address, a file, or bytes. Raises UsageError that names the argument.

    detail        how closely it is looked at, where the model can be told
    keep          the prompt up to here is kept by providers that ask for it: "5m" or "1h"
    limit_bytes   the most of `path` and `data`
    """
    if detail not in get_args(Detail):
        raise UsageError(f"llm.image(detail=...) is auto, low or high, not {detail!r}", "detail")
    made = _media("image", url, path, data, keep, limit_bytes)
    return replace(made, detail="" if detail == "auto" else detail)


def audio(
    *,
    url: str | None = None,
    path: str | os.PathLike[str] | None = None,
    data: bytes | None = None,
    keep: Kept = "",
    limit_bytes: int = MAX_BYTES,
) -> Media:
    """A sound, as `image` takes one. Raises UsageError that names the argument."""
    return _media("audio", url, path, data, keep, limit_bytes)


def document(
    *,
    url: str | None = None,
    path: str | os.PathLike[str] | None = None,
    data: bytes | None = None,
    name: str = "",
    keep: Kept = "",
    limit_bytes: int = MAX_BYTES,
) -> Media:
    """A PDF, a text, or an office document, as `image` takes one. `name` is what the model is told it is called; the
    file's own, where there is one. Raises UsageError that names the argument.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise UsageError(f"llm.document(name=...) is a text of at most {MAX_NAME_CHARS} printable characters", "name")
    if not name and path is not None:
        name = Path(path).name[-MAX_NAME_CHARS:]
        name = name if name.isprintable() else ""
    return replace(_media("file", url, path, data, keep, limit_bytes, name), name=name)


def kept(how_long: Kept, part: str | KeptPart) -> Text | KeptPart:
    """`part`; providers that keep prompts on request are asked to keep the prompt up to its end, "5m" or "1h". Own
    clusters keep every prompt's beginning without being asked. Raises UsageError.
    """
    how_long = _keep(how_long, "llm.kept")
    if not how_long:
        raise UsageError('llm.kept(how_long, part): how_long is "5m" or "1h"', "how_long")
    if isinstance(part, str):
        return Text(part, kept=how_long)
    if not isinstance(part, Text | Media):
        raise UsageError(f"llm.kept(how_long, part) keeps a text or a part, not a {type(part).__name__}", "part")
    return replace(part, kept=how_long)


def _keep(value: Any, verb: str) -> Kept:
    if value not in get_args(Kept):
        raise UsageError(f'{verb}(...): a prompt is kept for "5m" or "1h", not {value!r}', "keep")
    found: Kept = value
    return found


def _media(kind: Kind, url: Any, path: Any, data: Any, keep: Any, limit_bytes: int, name: str = "") -> Media:
    """Its `path`, the place for errors, is the function's name until it stands in a conversation."""
    verb = _VERBS[kind]
    given = [one for one, value in (("url", url), ("path", path), ("data", data)) if value is not None]
    if len(given) != 1:
        told = "got none" if not given else f"got {' and '.join(given)}"
        raise UsageError(
            f"{verb}(...) takes exactly one of url=, path= and data=; it {told}", given[0] if given else ""
        )
    kept_for = _keep(keep, verb)
    if type(limit_bytes) is not int or limit_bytes < 1:
        words = f"{verb}(limit_bytes=...) is a number of bytes, at least 1, not {limit_bytes!r}"
        raise UsageError(words, "limit_bytes")
    if url is not None:
        return Media(kind=kind, path=f"{verb}(url=...)", url=_address(url, verb), kept=kept_for)
    if path is not None:
        data, name = _read(path, verb, limit_bytes), os.fspath(path)
    place = f"{verb}({given[0]}=...)"
    content = _checked_bytes(data, place, given[0], limit_bytes)
    media_type = _type_of(kind, content, name, place, given[0])
    encoded = base64.b64encode(content).decode()
    return Media(kind=kind, path=place, media_type=media_type, data=encoded, kept=kept_for)


def _address(url: Any, verb: str) -> str:
    from diptych.cluster.providers.addresses import NotFetchable, read_url

    if not isinstance(url, str):
        raise UsageError(f"{verb}(url=...) is a text, not a {type(url).__name__}", "url")
    scheme = url.partition(":")[0].lower() if ":" in url else ""
    if scheme == "data":
        raise UsageError(f"{verb}(url=...): give the bytes of a data: address as data=", "url")
    if scheme == "file" or not scheme:
        raise UsageError(
            f"{verb}(url=...) takes http and https addresses, not {url[:60]!r}: a file of this machine is path=", "url"
        )
    try:
        read_url(url)
    except NotFetchable as exc:
        shown = _USER.sub("://...@", url)[:60]  # no password into logs
        raise UsageError(f"{verb}(url=...): {shown!r} cannot be: {exc}", "url") from None
    return url


def _read(path: Any, verb: str, limit_bytes: int) -> bytes:
    """One byte more than the limit at the most, whatever the file grows to."""
    try:
        file = Path(path)
        if not file.is_file():
            told = "is no file" if file.exists() else "is not there"
            raise UsageError(f"{verb}(path=...): {os.fspath(path)!r} {told}", "path")
        with file.open("rb") as opened:
            return opened.read(limit_bytes + 1)
    except (TypeError, ValueError) as exc:
        if isinstance(exc, UsageError):
            raise
        raise UsageError(f"{verb}(path=...): {path!r} is no path: {exc}", "path") from exc
    except OSError as exc:
        raise UsageError(f"{verb}(path=...): {os.fspath(path)!r} cannot be read: {exc.strerror}", "path") from exc


def _checked_bytes(data: Any, place: str, argument: str, limit_bytes: int) -> bytes:
    if isinstance(data, str):
        raise UsageError(f"{place} takes bytes, not text: base64.b64decode(...) makes bytes of base64", argument)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UsageError(f"{place} takes bytes, not a {type(data).__name__}", argument)
    content = bytes(data)
    if not content:
        raise UsageError(f"{place} is empty", argument)
    if len(content) > limit_bytes:
        raise UsageError(
            f"{place} has more than {limit_bytes:,} bytes: make it smaller, or raise limit_bytes= where the model "
            f"takes more",
            argument,
        )
    return content


def _type_of(kind: Kind, content: bytes, name: str, place: str, argument: str) -> str:
    """Raises UsageError for what is of another kind."""
    found = by_bytes(content) or (_document_type(content, name) if kind == "file" else "")
    is_of_kind = found.startswith(f"{kind}/") if kind != "file" else not found.startswith(("image/", "audio/"))
    if found and is_of_kind:
        return found
    other: Kind | None = "image" if found.startswith("image/") else "audio" if found.startswith("audio/") else None
    if other is None and found:
        other = "file"
    what = f"holds {found}" if found else f"begins with {content[:8]!r}, which is no {_NOUNS[kind]} that models take"
    remedy = f": that is {_VERBS[other]}(...)" if other is not None else ""
    raise UsageError(f"{place} {what}{remedy}", argument)


def _document_type(content: bytes, name: str) -> str:
    """Of what does not say itself in its first bytes. A name chooses among texts, and among old office formats."""
    by_end = by_name(name)
    if content.startswith(b"PK\x03\x04"):
        members = _members(content)
        return next((by_name(f".{end}") for member, end in _OFFICE.items() if member in members), "")
    if content.startswith(_OLD_OFFICE):
        return by_end if by_end in (by_name(".doc"), by_name(".xls")) else ""
    try:
        words = content.decode()
    except UnicodeDecodeError:
        return ""
    if "\0" in words:
        return ""
    if by_end == "application/json":
        return by_end if _is_json(words) else "text/plain"
    return by_end if by_end.startswith("text/") else "text/plain"


def _members(content: bytes) -> set[str]:
    """The names in a zip archive; none where its list of them is longer than any document's."""
    import zipfile
    from io import BytesIO

    at = content.rfind(b"PK\x05\x06")
    if at < 0 or int.from_bytes(content[at + 12 : at + 16], "little") > _MOST_LIST_BYTES:
        return set()
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            return set(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return set()


def _is_json(words: str) -> bool:
    try:
        json.loads(words)
    except (ValueError, RecursionError):
        return False
    return True
