"""The tables' versions: one line of migrations that ends where the MetaData is, applied once, never by a router."""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

import diptych.cluster.store
from diptych.cluster.store.database import Store, open_store
from diptych.cluster.store.engines import file_of, url_of
from diptych.cluster.store.schema import MIGRATIONS, prepare_store, revisions
from diptych.cluster.store.settings import StoreSettings
from diptych.cluster.store.tables import METADATA
from diptych.cluster.store.testing import bare, open_raw, prepared
from diptych.protos.errors import StartupError


def run(folder: Path, statement: str) -> list[tuple[Any, ...]]:
    """By the store of a folder, behind Diptych's back; what it returns."""
    engine = open_raw(folder)
    with engine.begin() as connection:
        done = connection.execute(text(statement))
        rows = [tuple(row) for row in done] if done.returns_rows else []
    engine.dispose()
    return rows


def test_the_migrations_make_the_tables_of_the_modules(tmp_path: Path) -> None:
    """A column that one of them forgot would be missed by the first request that writes it."""
    for module in pkgutil.iter_modules(diptych.cluster.store.__path__):
        if module.name not in ("testing", "migrations"):
            importlib.import_module(f"diptych.cluster.store.{module.name}")
    prepared(tmp_path)
    engine = open_raw(tmp_path)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
    engine.dispose()


def test_the_migrations_are_one_line() -> None:
    """Two that follow the same one would be applied in any order."""
    script = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])
    (head,) = script.get_heads()
    assert [step.revision for step in reversed(list(script.walk_revisions()))] == revisions()
    assert head == revisions()[-1]
    for step in script.walk_revisions():
        assert Path(step.path).name == f"m{step.revision}.py"
        assert not hasattr(step.module, "downgrade")


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    prepared(tmp_path)
    run(tmp_path, "UPDATE key_changes SET number = 7")
    prepared(tmp_path)
    assert run(tmp_path, "SELECT number FROM key_changes") == [(7,)]
    assert run(tmp_path, "SELECT version_num FROM alembic_version") == [(revisions()[-1],)]


def test_responses_of_the_version_before_count_for_their_tenants_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there when a store is brought up must not be free, and the version before goes on beside the new one."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for file in MIGRATIONS.glob("m*.py"):
        if file.name < "m0005":
            (folder / file.name).write_text(file.read_text())
    old = (
        "INSERT INTO responses VALUES ('{}', 'a', NULL, 'completed', 1, 9, false, true, NULL, '{{\"a\": 1}}', '[1, 2]')"
    )
    with monkeypatch.context() as patched:
        patched.setattr("diptych.cluster.store.schema.MIGRATIONS", folder)
        prepared(tmp_path)
    for name in ("with events", "without"):
        run(tmp_path, old.format(name))
    run(tmp_path, "INSERT INTO response_events VALUES ('with events', 0, 'four'), ('with events', 1, 'five')")
    prepared(tmp_path)
    names = "id, tenant, status, created_at, expires_at, in_background, has_events, body, input"
    run(tmp_path, f"INSERT INTO responses ({names}) VALUES ('late', 'a', 'completed', 1, 9, false, true, '{{}}', '[]')")
    found = dict(run(tmp_path, "SELECT id, num_bytes FROM responses WHERE NOT is_to_end"))
    assert found == {"with events": 22, "without": 14, "late": 0}


def _prepare(folder: str, failed: object) -> None:
    try:
        prepared(Path(folder))
    except BaseException as exc:
        failed.put(repr(exc))  # type: ignore[attr-defined]


def test_several_that_start_at_once_take_turns(tmp_path: Path) -> None:
    """Each `diptych serve` of a user migrates the same file."""
    context = multiprocessing.get_context("spawn")
    failed = context.Queue()
    several = [context.Process(target=_prepare, args=(str(tmp_path), failed)) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join(120)
    assert failed.empty(), failed.get()
    assert run(tmp_path, "SELECT count(*) FROM key_changes") == [(1,)]


async def test_a_router_starts_on_no_store_that_was_not_migrated(tmp_path: Path) -> None:
    store = Store(url_of(bare(tmp_path), tmp_path), folder=tmp_path)
    with pytest.raises(StartupError, match=r"lacks the migrations 0001_keys.*`diptych serve` applies them"):
        await store.start()
    await store.stop()


async def test_a_store_of_a_newer_version_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """Its tables may mean something else by now."""
    prepared(tmp_path)
    run(tmp_path, "UPDATE alembic_version SET version_num = '9999_later'")
    words = r"the store \S+ was made by a newer version of Diptych: .*9999_later.* start that version, or name another"
    with pytest.raises(StartupError, match=words):
        prepared(tmp_path)
    store = open_store(bare(tmp_path), tmp_path)
    with pytest.raises(StartupError, match=words):
        await store.start()
    await store.stop()


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite rolls a CREATE TABLE back only in a transaction that was begun by hand."""
    prepared(tmp_path)
    folder = tmp_path / "migrations"
    folder.mkdir()
    for file in MIGRATIONS.glob("m*.py"):
        (folder / file.name).write_text(file.read_text())
    last = revisions()[-1]
    (folder / "m9998_half.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision = '9998_half'\ndown_revision = {last!r}\n"
        "def upgrade():\n    op.create_table('half', sa.Column('id', sa.Integer(), primary_key=True))\n"
        "    op.execute('no SQL')\n"
    )
    monkeypatch.setattr("diptych.cluster.store.schema.MIGRATIONS", folder)
    with pytest.raises(StartupError, match="cannot be used"):
        prepared(tmp_path)
    engine = open_raw(tmp_path)
    assert not inspect(engine).has_table("half")
    engine.dispose()
    assert run(tmp_path, "SELECT version_num FROM alembic_version") == [(last,)]


def test_what_is_no_database_or_cannot_be_made_is_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "diptych.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StartupError, match=r"diptych\.db cannot be used: .*not a database.*data_dir or store\.url"):
        prepare_store(StoreSettings(), tmp_path)
    with pytest.raises(StartupError, match="set data_dir to a folder"):
        prepare_store(StoreSettings(), Path("/proc/none"))
    for url, words in (("mysql://u@h/d", "is not supported"), ("postgresql+nodriver://u@h/d", "is not installed")):
        with pytest.raises(StartupError, match=words):
            prepare_store(StoreSettings(url=url), tmp_path)


def test_the_url_of_a_configuration(tmp_path: Path) -> None:
    assert file_of(url_of(StoreSettings(), tmp_path)) == tmp_path / "diptych.db"
    assert file_of(url_of(StoreSettings(url="sqlite:///x.db"), tmp_path)) == Path("x.db").absolute()
    assert file_of(url_of(StoreSettings(url="sqlite:////a/b.db"), tmp_path)) == Path("/a/b.db")
    file = tmp_path / "password"
    file.write_text("p@ss:w/rd\n")
    settings = StoreSettings(url="postgresql+psycopg://u@h/d", password_file=file)
    file.chmod(0o644)
    with pytest.raises(StartupError, match=r"store\.password_file: .*chmod 600"):
        url_of(settings, tmp_path)
    file.chmod(0o600)
    assert url_of(settings, tmp_path) == "postgresql+psycopg://u:p%40ss%3Aw%2Frd@h/d"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("postgresql://u:secret@h/d", "holds a password.*store.password_file"),
        ("postgresql://u@h/d?password=secret", "holds a password"),
        ("diptych.db", "does not begin like a URL"),
        ("", "does not begin like a URL"),
    ],
)
def test_a_url_that_would_not_do_is_refused_and_shows_no_password(url: str, words: str) -> None:
    from diptych.cluster.config import load_config

    with pytest.raises(StartupError, match=rf"store\.url: .*{words}") as told:
        load_config(overrides=[f"store.url='{url}'"])
    assert "secret" not in str(told.value)
