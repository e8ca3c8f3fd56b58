"""The branch `store:` of diptych.yaml, without SQLAlchemy: every command reads the configuration."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator

from diptych.protos.settings import Seconds, Settings

_SQLITE = re.compile(r"(?P<scheme>sqlite(\+pysqlite)?://)/?(?P<file>[^?]*)(?P<rest>.*)")
_SCHEME = re.compile(r"[a-z][a-z0-9_]*(\+[a-z0-9_]+)?://")


class StoreSettings(Settings):
    """What outlives a router: keys, files, batches, responses, idempotency records."""

    url: str | None = Field(
        None,
        description="SQLAlchemy URL of the database, SQLite's or PostgreSQL's; null: the file diptych.db in data_dir",
    )
    password_file: Path | None = Field(
        None, description="the password for that URL, readable by nobody else; null: none is sent"
    )
    max_waiting: int = Field(4096, ge=1, description="reads, and writes, that wait; one more gets 503 with retry-after")
    lock_timeout_s: Seconds = Field(5.0, description="wait for another process that writes to the same SQLite file")

    @field_validator("url")
    @classmethod
    def _a_place_for_all(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not _SCHEME.match(url):
            raise ValueError(
                f"{url.partition('://')[0][:40]!r} does not begin like a URL; write sqlite:////folder/file.db, or "
                "postgresql+psycopg://user@host/database"
            )
        if found := _SQLITE.fullmatch(url):
            file = found["file"]
            if not file or file.startswith((":memory:", "file:")):
                raise ValueError(
                    "a database in memory belongs to one process alone; write sqlite:////folder/file.db with the "
                    "path of a file, or leave store.url out"
                )
            # Relative to where the command was given: a router runs in another folder.
            return f"{found['scheme']}/{os.path.abspath(os.path.expanduser(file))}{found['rest']}"
        parts = urlsplit(url)
        if parts.password is not None or "password" in parse_qs(parts.query, keep_blank_values=True):
            raise ValueError(
                "it holds a password, which state files and other users' process lists would show; write that into "
                "a file of mode 600, and its path into store.password_file"
            )
        return url

    @field_validator("password_file")
    @classmethod
    def _absolute(cls, file: Path | None) -> Path | None:
        return None if file is None else Path(os.path.abspath(file.expanduser()))
