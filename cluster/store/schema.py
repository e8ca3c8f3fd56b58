"""The tables' versions: brings a store up to what this program knows, and refuses one that knows more.

`migrate` is called once by `diptych serve` (and by commands that write) before routers start; routers only `check`.
alembic does the work and is imported only when there is some.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from diptych.protos.errors import StartupError

from .engines import CONTENTS, make_private, shown, url_of, writing_engine
from .settings import StoreSettings

MIGRATIONS = Path(__file__).with_name("migrations")
MIGRATE_LOCK_S = 60.0  # another `diptych serve` may be at it
_VERSIONS = "alembic_version"
_FILE = re.compile(r"m([0-9]{4}_[a-z0-9_]+)\.py")
_PG_LOCK = 0x64697074  # any number that nobody else takes for an advisory lock


def revisions() -> list[str]:
    """All that this program knows, oldest first."""
    return sorted(found[1] for file in MIGRATIONS.iterdir() if (found := _FILE.fullmatch(file.name)))


def prepare_store(settings: StoreSettings, data_dir: Path) -> str:
    """Make the store of a configuration, or bring it up to date; its URL, for Store alone. Raises StartupError."""
    url = url_of(settings, data_dir)
    migrate(url, data_dir / CONTENTS)
    return url


def migrate(url: str, folder: Path) -> None:
    """Make the store, or bring it up to date, in one transaction; waits for another process that does the same.

    Raises StartupError: no room, no right to, no such server, made by a newer program.
    """
    make_private(url, folder)
    engine = writing_engine(url, MIGRATE_LOCK_S)
    try:
        with _in_words(url), engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _PG_LOCK})
            if _missing(connection, url):
                _upgrade(connection)
    finally:
        engine.dispose()


def waiting_migrations(url: str) -> list[str]:
    """Those that the next start would apply to a store that is there. Raises StartupError where it cannot be used."""
    engine = writing_engine(url)
    try:
        with _in_words(url), engine.begin() as connection:  # with the write lock: one that is read only is told
            return _missing(connection, url)
    finally:
        engine.dispose()


def check(engine: Engine, url: str) -> None:
    """Raises StartupError unless the store has the tables of this program."""
    with _in_words(url), engine.connect() as connection:
        if missing := _missing(connection, url):
            raise StartupError(
                f"the store {shown(url)} lacks the migrations {', '.join(missing)}: `diptych serve` applies them "
                "as it starts"
            )


def _missing(connection: Connection, url: str) -> list[str]:
    known = revisions()
    if not inspect(connection).has_table(_VERSIONS):
        return known
    present = set(connection.execute(text(f"SELECT version_num FROM {_VERSIONS}")).scalars())
    if newer := sorted(present - set(known)):
        raise StartupError(
            f"the store {shown(url)} was made by a newer version of Diptych: its tables are those of "
            f"{', '.join(newer)}, and this version knows them up to {known[-1]}; start that version, or name another "
            "store with data_dir or store.url"
        )
    return [name for name in known if name > max(present)] if present else known


def _upgrade(connection: Connection) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])
    context = EnvironmentContext(
        Config(), script, fn=lambda present, _: script._upgrade_revs("heads", present), destination_rev="heads"
    )
    with context:
        # One transaction, ours: SQLite can roll back a CREATE TABLE when it was begun by hand.
        context.configure(connection=connection, transactional_ddl=True, version_table=_VERSIONS)
        context.run_migrations()


@contextmanager
def _in_words(url: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as exc:
        raise StartupError(
            f"the store {shown(url)} cannot be used: {' '.join(str(exc.orig).split())[:300]}; check that it is a "
            "database of Diptych's that can be written, or name another with data_dir or store.url"
        ) from exc
