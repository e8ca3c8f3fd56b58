"""SQLAlchemy engines for a store's URL: one for the writer, one for readers, with what SQLite has to be told.

Called by database.py and schema.py. The one place that knows pragmas, file modes and where a password comes from.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from diptych.cluster.security import read_file
from diptych.protos.errors import StartupError

from .settings import StoreSettings

DATABASE = "diptych.db"
CONTENTS = "contents"
LOCK_TIMEOUT_S = 5.0
_WAL_BYTES = 64 << 20  # the log is cut to this after a checkpoint
# Of libpq's: a server that says nothing is gone in seconds, not in the quarter of an hour that TCP gives it. What the
# URL says counts before them.
_SILENCE = {
    "connect_timeout": "5",  # seconds
    "tcp_user_timeout": "10000",  # milliseconds, of what is sent and not confirmed
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
}
_LIBPQ = ("psycopg", "psycopg2")


def url_of(settings: StoreSettings, data_dir: Path) -> str:
    """The URL with its password; that one is for Store alone. Raises StartupError for a spoilt file of it."""
    if settings.url is None:
        if "?" in str(data_dir):
            raise StartupError(f"data_dir: {data_dir} holds a question mark, which ends the path of a URL")
        return URL.create("sqlite", database=str(data_dir / DATABASE)).render_as_string()
    if settings.password_file is None:
        return settings.url
    text = read_file("store.password_file", settings.password_file, is_private=True)
    try:
        password = text.decode().removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise StartupError(f"store.password_file: {settings.password_file} is not UTF-8 text") from exc
    return _parsed(settings.url).set(password=password).render_as_string(hide_password=False)


def shown(url: str) -> str:
    """For messages: without the password; of SQLite the file alone."""
    parsed = make_url(url)
    return str(parsed.database) if parsed.get_backend_name() == "sqlite" else parsed.render_as_string()


def file_of(url: str) -> Path | None:
    """SQLite's file; None for a server."""
    parsed = _parsed(url)
    return Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None


def make_private(url: str, folder: Path) -> None:
    """Make the folder for contents and SQLite's empty file where they do not exist, for no other user. Raises
    StartupError.
    """
    file = file_of(url)
    try:
        for place in (folder.parent, folder, *([] if file is None else [file.parent])):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if file is not None and not file.exists():
            # Never opened by hand once it exists: closing it would drop the locks that SQLite holds in this process.
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise StartupError(
            f"cannot make the store {shown(url)}, or {folder} for contents of files: {exc.strerror or exc}; set "
            "data_dir to a folder on a local disk that can be written, or store.url to a database"
        ) from exc


def writing_engine(url: str, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Engine:
    """One connection; a transaction has SQLite's write lock from its begin. Raises StartupError for a wrong URL."""
    engine = _engine(url, lock_timeout_s, connections=1)
    if engine.dialect.name == "sqlite":
        event.listens_for(engine, "begin")(_begin_immediate)
    return engine


def reading_engine(url: str, lock_timeout_s: float, connections: int) -> Engine:
    """Connections that cannot write; a transaction sees one state. Raises StartupError for a wrong URL."""
    engine = _engine(url, lock_timeout_s, connections=connections)
    if engine.dialect.name != "sqlite":
        return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    event.listens_for(engine, "connect")(_query_only)
    event.listens_for(engine, "begin")(_begin)
    return engine


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as exc:
        raise StartupError("store.url is no URL of SQLAlchemy's form, dialect+driver://user@host/database") from exc


def _engine(url: str, lock_timeout_s: float, connections: int) -> Engine:
    parsed = _parsed(url)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StartupError(f"store.url: {parsed.get_backend_name()!r} is not supported; use sqlite or postgresql")
    is_sqlite = parsed.get_backend_name() == "sqlite"
    more: dict[str, Any] = {"connect_args": {"timeout": lock_timeout_s}}
    if not is_sqlite:
        silence = _SILENCE if parsed.get_driver_name() in _LIBPQ else {}
        own = {name: value for name, value in silence.items() if name not in parsed.query}
        more = {"pool_pre_ping": True, "connect_args": own}
    try:
        engine = create_engine(parsed, pool_size=connections, max_overflow=0, **more)
    except (NoSuchModuleError, ModuleNotFoundError) as exc:
        raise StartupError(
            f"store.url asks for the driver {parsed.drivername!r}, which is not installed; for PostgreSQL: "
            "pip install 'psycopg[binary]', and write postgresql+psycopg://..."
        ) from exc
    if is_sqlite:
        event.listens_for(engine, "connect")(_set_up)
    return engine


def _set_up(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says so, not where sqlite3 guesses
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        connection.execute("PRAGMA journal_mode = WAL")


def _query_only(connection: sqlite3.Connection, record: object) -> None:
    connection.execute("PRAGMA query_only = ON")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")
