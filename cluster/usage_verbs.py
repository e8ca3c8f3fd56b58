"""The verb `diptych usage`: what requests used and cost, from the store of a configuration or from a running server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from diptych.protos.errors import DiptychError, InvalidRequest, StartupError
from diptych.protos.openai_replies import JsonObject
from diptych.protos.strict_json import printable

from .client.wire import headers
from .config import api_key, load_config
from .store.database import open_store
from .store.schema import prepare_store
from .usage import read_query, usage_of

TIMEOUT_S = 30.0


def run_usage(
    fields: Mapping[str, str], *, config: Path | None, overrides: Sequence[str], url: str | None, as_json: bool
) -> int:
    """Print it; the exit code. `fields` are those of GET /v1/usage; without `url` the store is read, of all tenants
    where they name none.
    """
    try:
        told = _stored(fields, config, overrides) if url is None else _served(url, fields)
    except InvalidRequest as exc:
        print(f"diptych: --{exc.message}", file=sys.stderr)
        return 2
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    print(json.dumps(told, indent=2) if as_json else render(told))
    return 0


def render(told: Mapping[str, Any]) -> str:
    """Tables for a terminal."""
    rows = [[told["by"], "requests", "input", "output", "cached", "dollars", "unpriced"]]
    rows += [_row(row["name"] or "-", row) for row in told["data"]]
    rows += [_row("total", told["total"])] if len(told["data"]) != 1 else []
    whose = "all tenants" if told["tenant"] == "*" else f"the tenant {told['tenant']}" if told["tenant"] else "nobody's"
    lines = [f"{whose}, {told['since']} to {told['until']}", "", *_table(rows)]
    if told["has_more"]:
        lines.append(f"the first {len(told['data'])} rows; the total is of all")
    if told["budgets"]:
        rows = [["budget", "whose", "period", "dollars", "spent", "in work", "lost", "left"]]
        for one in told["budgets"]:
            money = (one[name] for name in ("amount_usd", "spent_usd", "held_usd", "lost_usd", "left_usd"))
            rows.append([one["budget"], one["scope"] or "-", one["period"], *map(_dollars, money)])
        lines += ["", *_table(rows)]
    return "\n".join(lines)


def _stored(fields: Mapping[str, str], config: Path | None, overrides: Sequence[str]) -> JsonObject:
    now = time.time()
    query = read_query(fields, None, now)
    loaded = load_config(config, overrides)
    prepare_store(loaded.store, loaded.data_dir)

    async def look() -> JsonObject:
        store = open_store(loaded.store, loaded.data_dir)
        await store.start()
        try:
            return await store.read(usage_of(query, loaded.gateway.budgets, now))
        finally:
            await store.stop()

    return asyncio.run(look())


def _served(url: str, fields: Mapping[str, str]) -> JsonObject:
    asked = f"{url.rstrip('/')}/v1/usage?{urlencode(fields)}"
    try:
        request = urllib.request.Request(asked, headers=headers("", api_key()))
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            told = json.load(reply)
    except urllib.error.HTTPError as exc:
        with exc:
            words = _words(exc.read(65_536))
        if exc.code == 401:
            words = "it wants a key; put it into the variable DIPTYCH_API_KEY"
        raise StartupError(f"{url}: {words or exc}") from exc
    except (OSError, ValueError, HTTPException) as exc:
        raise StartupError(f"{url} does not answer: {exc}") from exc
    if not isinstance(told, dict) or told.get("object") != "usage":
        raise StartupError(f"{url} is no Diptych cluster")
    return told


def _words(body: bytes) -> str:
    try:
        return printable(str(json.loads(body)["error"]["message"]), 500)
    except (ValueError, KeyError, TypeError):
        return ""


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    counts = (str(row[key]) for key in ("requests", "input_tokens", "output_tokens", "cache_read_tokens"))
    return [name, *counts, _dollars(row["cost_usd"]), str(row["unpriced"] or "-")]


def _dollars(amount: float | None) -> str:
    return "unknown" if amount is None else f"{amount:.6f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
