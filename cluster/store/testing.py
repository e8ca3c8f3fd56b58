"""A store of its own for a test or a measurement: SQLite in a temporary folder that goes with it.

With DIPTYCH_TEST_POSTGRES=postgresql+psycopg://user@host/database each store is a schema of that database instead.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine, text

from diptych.cluster.observability.metrics import RouterMetrics

from .database import Store, open_store
from .engines import url_of, writing_engine
from .schema import prepare_store
from .settings import StoreSettings

POSTGRES = "DIPTYCH_TEST_POSTGRES"


@asynccontextmanager
async def temporary_store(metrics: RouterMetrics | None = None, data_dir: Path | None = None) -> AsyncIterator[Store]:
    """Started; stopped afterwards. `data_dir`: one that is kept; else a fresh one that is removed."""
    with tempfile.TemporaryDirectory() as fresh:
        folder = data_dir or Path(fresh)
        settings = await asyncio.to_thread(prepared, folder)
        store = open_store(settings, folder, metrics)
        await store.start()
        try:
            yield store
        finally:
            await store.stop()
            if data_dir is None:
                await asyncio.to_thread(_on_server, f"DROP SCHEMA IF EXISTS {_schema(folder)} CASCADE")


def prepared(folder: Path) -> StoreSettings:
    """Settings of the store that belongs to a folder, in this process and in others; its tables are made."""
    settings = bare(folder)
    prepare_store(settings, folder)
    return settings


def bare(folder: Path) -> StoreSettings:
    """As `prepared`, and nothing is made."""
    if not (server := os.environ.get(POSTGRES)):
        return StoreSettings()
    _on_server(f"CREATE SCHEMA IF NOT EXISTS {_schema(folder)}")
    return StoreSettings(url=f"{server}?options=-csearch_path%3D{_schema(folder)}")


def open_raw(folder: Path) -> Engine:
    """For a test that looks into a folder's store, or spoils it."""
    return writing_engine(url_of(bare(folder), folder))


def _schema(folder: Path) -> str:
    return "t" + hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]


def _on_server(statement: str) -> None:
    """Nothing with SQLite."""
    if not (server := os.environ.get(POSTGRES)):
        return
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()
