"""The verbs `diptych keys create`, `list` and `revoke`: on the store of a configuration, or appending to a file.

A key is shown once, by `create`; the store and the file get its hash. A router that runs sees a change at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from diptych.protos.errors import DiptychError, StartupError
from diptych.protos.strict_json import printable

from .config import DiptychConfig, load_config
from .key_file import add_key, key_line, read_keys
from .keys import USUAL_SCOPES, Key, Override, Scope, key_of, make_key, row_of, time_of
from .store import keys as rows
from .store.database import Store, open_store
from .store.schema import prepare_store

T = TypeVar("T")


def run_create(
    tenant: str,
    *,
    name: str,
    scopes: Sequence[str],
    expires: str | None,
    limits: tuple[int | None, int | None],
    routing: tuple[Sequence[str], Sequence[str]] = ((), ()),
    file: Path | None,
    place: Callable[[], DiptychConfig],
) -> int:
    """Print the key; the exit code. `limits`: requests per minute and concurrency; `routing`: what it may override, and
    its tags; `place` is asked where `file` is None.
    """

    def create() -> None:
        try:
            shown, key = make_key(
                tenant,
                name=name,
                scopes=frozenset(_scope(word) for word in scopes) or USUAL_SCOPES,
                expires_at=None if expires is None else _later(time_of(expires, time.time())),
                requests_per_minute=limits[0],
                concurrency=limits[1],
                may_override=frozenset(_override(word) for word in routing[0]),
                tags=tuple(routing[1]),
            )
        except ValueError as exc:
            raise StartupError(str(exc)) from exc
        if file is not None:
            add_key(file, key_line(key))
        else:
            _with_store(place(), lambda store: store.write(lambda c: rows.add(c, row_of(key))))
        print(shown)
        print(f"{key.id} of {key.tenant}: shown this once; {_described(key)}", file=sys.stderr)

    return _told(create)


def run_list(tenant: str | None, *, as_json: bool, place: Callable[[], DiptychConfig]) -> int:
    """Print all keys of both sources, or a tenant's; never a key itself, nor its hash."""

    def show() -> None:
        config = place()
        stored = _with_store(config, lambda store: store.read(lambda c: rows.listed(c, tenant)))
        found = [("store", key_of(row)) for row in stored]
        file = config.security.api_keys
        if file is not None:
            found += [(str(file), key) for key in read_keys(file) if tenant in (None, key.tenant)]
        if as_json:
            print(json.dumps([_plain(source, key) for source, key in found], indent=2))
        elif not found:
            if tenant is None:
                print("no keys: make one with `diptych keys create TENANT`; without any, nobody is asked for one")
            else:
                print(f"no keys of {printable(tenant)}: make one with `diptych keys create TENANT`")
        else:
            head = ["id", "tenant", "name", "scopes", "state", "expires", "a minute", "at once", "source"]
            print(table([head, *(_row(source, key) for source, key in found)]))

    return _told(show)


def run_revoke(key_id: str, *, place: Callable[[], DiptychConfig]) -> int:
    """From now on it opens nothing."""

    def revoke() -> None:
        config = place()
        if _with_store(config, lambda store: store.write(lambda c: rows.disable(c, key_id))):
            print(f"{key_id} is revoked")
            return
        file = config.security.api_keys
        if file is not None and any(key.id == key_id for key in read_keys(file)):
            raise StartupError(f'{key_id} stands in {file}: take its line out, or write "disabled": true into it')
        raise StartupError(f"there is no key {key_id!r}; `diptych keys list` shows them by their ids")

    return _told(revoke)


def place_of(config: Path | None, overrides: Sequence[str] | None) -> Callable[[], DiptychConfig]:
    """The configuration whose store is meant; raises StartupError when it is called."""
    return lambda: load_config(config, overrides or [])


def _told(work: Callable[[], None]) -> int:
    try:
        work()
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    return 0


def _with_store(config: DiptychConfig, work: Callable[[Store], Awaitable[T]]) -> T:
    prepare_store(config.store, config.data_dir)

    async def run() -> T:
        store = open_store(config.store, config.data_dir)
        await store.start()
        try:
            return await work(store)
        finally:
            await store.stop()

    return asyncio.run(run())


def _scope(word: str) -> Scope:
    try:
        return Scope(word)
    except ValueError:
        raise ValueError(f"there is no scope {word!r}; there are {', '.join(Scope)}") from None


def _override(word: str) -> Override:
    try:
        return Override(word)
    except ValueError:
        raise ValueError(f"there is no override {word!r}; there are {', '.join(Override)}") from None


def _later(at: int) -> int:
    if at <= time.time():
        raise ValueError("a key that has expired already opens nothing; name a later time")
    return at


def _state(key: Key) -> str:
    if key.disabled:
        return "revoked"
    return "opens" if time.time() < key.opens_until else "expired"


def _day(at: int | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%MZ")


def _described(key: Key) -> str:
    parts = [f"opens {', '.join(sorted(key.scopes))}"]
    parts += [f"until {_day(key.expires_at)}"] if key.expires_at is not None else []
    parts += [f"{key.requests_per_minute} requests a minute"] if key.requests_per_minute is not None else []
    parts += [f"{key.concurrency} at once"] if key.concurrency is not None else []
    parts += [f"may override {', '.join(sorted(key.may_override))}"] if key.may_override else []
    parts += [f"tags {', '.join(key.tags)}"] if key.tags else []
    return ", ".join(parts)


def _plain(source: str, key: Key) -> dict[str, object]:
    told = json.loads(key_line(key))
    del told["sha256"]
    return {**told, "state": _state(key), "source": source}


def _row(source: str, key: Key) -> list[str]:
    scopes = ",".join(sorted(key.scopes))
    limits = [str(limit) if limit is not None else "-" for limit in (key.requests_per_minute, key.concurrency)]
    return [key.id, key.tenant, key.name, scopes, _state(key), _day(key.expires_at), *limits, source]


def table(lines: list[list[str]]) -> str:
    """Columns as wide as they must be; the first line is the head."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
