"""OpenAI's files on the wire, as pure functions: the fields of an upload, a file's object, pages of lists.

Called by cluster/api. A file's name is a text that is kept and told again; nothing here or elsewhere makes it a path.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .errors import InvalidRequest, RequestError
from .strict_json import printable
from .wire_checks import JsonObject, an_object, one_of, refuse

FILE_ID: Final = re.compile(r"file-[0-9a-f]{32}")
BATCH: Final = "batch"
BATCH_OUTPUT: Final = "batch_output"
PURPOSES: Final = ("assistants", BATCH, "user_data", "vision")
ALL_PURPOSES: Final = (*PURPOSES, BATCH_OUTPUT)
_REFUSED: Final = {
    "fine-tune": "this server trains no models",
    "evals": "this server runs no evaluations",
    BATCH_OUTPUT: "such files are made by batches alone",
}
MAX_NAME_CHARS: Final = 255
LEAST_EXPIRY_S: Final = 3600
MOST_EXPIRY_S: Final = 30 * 86_400
_ANCHOR: Final = "created_at"
_UPLOAD_FIELDS: Final = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_DIGITS: Final = re.compile(r"[0-9]{1,9}")


class UnknownFile(RequestError):
    """The tenant has no file of that id; whether another has one is not told."""

    code = "file_not_found"
    http_status = 404


class QuotaExceeded(RequestError):
    """The tenant's files take all the room they may; deleting some makes room."""

    code = "storage_quota_exceeded"
    http_status = 403


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as clients see it. Times in seconds since 1970."""

    id: str
    purpose: str
    name: str
    num_bytes: int
    created_at: int
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class UploadFields:
    """What stands beside the contents. `expires_after_s` counts from the file's making; None: the purpose's default."""

    purpose: str
    expires_after_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """Which part of a list is asked for."""

    after: str | None
    limit: int
    is_ascending: bool = False
    purpose: str | None = None


def unknown_file(file_id: str, param: str = "file_id") -> UnknownFile:
    """The error for an id that is nobody's, is another's, or is none at all: in one wording."""
    return UnknownFile(f"there is no file {printable(file_id)}", param)


def read_upload(fields: Mapping[str, str]) -> UploadFields:
    """The fields of the form besides the file. Raises InvalidRequest."""
    for name in fields:
        if name not in _UPLOAD_FIELDS:
            known = ", ".join(("file", *_UPLOAD_FIELDS))
            raise InvalidRequest(
                f"unknown field {printable(name)} of the form; here may stand: {known}", printable(name)
            )
    return UploadFields(read_purpose(fields.get("purpose")), _form_expiry(fields))


def read_purpose(value: str | None) -> str:
    """What a file is for. Raises InvalidRequest."""
    if value in _REFUSED:
        raise refuse("purpose", f"{value} is refused: {_REFUSED[str(value)]}; use {', '.join(PURPOSES)}")
    return one_of(value, "purpose", PURPOSES)


def read_name(value: str) -> str:
    """The name of an uploaded file. Raises InvalidRequest for one that is meant as a path or cannot be shown."""
    if not value:
        raise refuse("file", "has no name: send a filename with the contents")
    if len(value) > MAX_NAME_CHARS:
        raise refuse("file", f"has a name of {len(value)} characters; the limit is {MAX_NAME_CHARS}")
    if value in (".", "..") or any(c in "/\\" or not c.isprintable() for c in value):
        raise refuse(
            "file", f"has the name {printable(value)}: send a name alone, without folders and control characters"
        )
    return value


def _form_expiry(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    is_number = seconds is not None and _DIGITS.fullmatch(seconds)
    return read_expiry({"anchor": anchor, "seconds": int(seconds or "") if is_number else seconds}, "expires_after")


def read_expiry(value: object, path: str) -> int | None:
    """OpenAI's expires_after and output_expires_after in seconds; None for null. Raises InvalidRequest."""
    if value is None:
        return None
    fields = an_object(value, path, ("anchor", "seconds"))
    one_of(fields.get("anchor"), f"{path}.anchor", (_ANCHOR,))
    seconds = fields.get("seconds")
    if type(seconds) is not int or not LEAST_EXPIRY_S <= seconds <= MOST_EXPIRY_S:
        raise refuse(
            f"{path}.seconds",
            f"must be a whole number from {LEAST_EXPIRY_S} (an hour) to {MOST_EXPIRY_S} (30 days)",
        )
    return seconds


def read_paging(query: Sequence[tuple[str, str]], *, known: Collection[str], most: int, default: int) -> Paging:
    """The query of a list, of whose fields `known` are honoured. Raises InvalidRequest."""
    fields: dict[str, str] = {}
    for name, value in query:
        if name not in known:
            raise InvalidRequest(
                f"there is no query {printable(name)} here; there are: {', '.join(sorted(known))}", printable(name)
            )
        if name in fields:
            raise InvalidRequest(f"{name} is given twice", name)
        fields[name] = value
    limit = fields.get("limit", str(default))
    if not _DIGITS.fullmatch(limit) or not 1 <= int(limit) <= most:
        raise refuse("limit", f"must be a whole number from 1 to {most}")
    order = one_of(fields.get("order", "desc"), "order", ("asc", "desc"))
    return Paging(
        after=fields.get("after") or None, limit=int(limit), is_ascending=order == "asc", purpose=fields.get("purpose")
    )


def file_object(file: StoredFile) -> JsonObject:
    """A file as the API tells it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def deleted_object(file_id: str) -> JsonObject:
    """What a deletion answers."""
    return {"id": file_id, "object": "file", "deleted": True}


def page_object(data: Sequence[Mapping[str, Any]], *, has_more: bool) -> JsonObject:
    """One page of a list; the next begins after `last_id`."""
    return {
        "object": "list",
        "data": list(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
