"""The verb `diptych status`: /info of a running cluster as tables."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.cluster.client.wire import headers
from diptych.cluster.config import api_key, load_config
from diptych.cluster.control.state import find_cluster
from diptych.protos.errors import DiptychError, StartupError

TIMEOUT_S = 5.0


def run_status(config: Path | None, overrides: Sequence[str], url: str | None) -> int:
    """Print; the exit code."""
    try:
        url = cluster_url(config, overrides, url)
        print(render(url, fetch_info(url)))
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    return 0


def cluster_url(config: Path | None, overrides: Sequence[str], url: str | None) -> str:
    """`url`, or that of the cluster that runs here, see control.connect.located. Raises StartupError when none does."""
    if url is not None:
        return url
    run_dir = load_config(config, overrides).run_dir
    if (state := find_cluster(run_dir)) is not None:
        return state.url
    from diptych.cluster.control.connect import deployed_url, located

    where = located(None, run_dir)
    return deployed_url(where) if isinstance(where, str) else where.url


def fetch_info(url: str) -> dict[str, Any]:
    """The answer of GET /info, asked with the key of the environment. Raises StartupError."""
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/info", headers=headers("", api_key()))
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            info = json.load(reply)
    except urllib.error.HTTPError as exc:
        if exc.code in (401, 403):
            raise StartupError(f"{url} wants an admin's key; put it into the variable DIPTYCH_API_KEY") from exc
        raise StartupError(f"{url} does not answer: {exc}") from exc
    except (OSError, ValueError, urllib.error.URLError) as exc:
        raise StartupError(f"{url} does not answer: {exc}") from exc
    if not isinstance(info, dict) or not isinstance(info.get("engines"), list):
        raise StartupError(f"{url} is no Diptych cluster")
    return info


def render(url: str, info: dict[str, Any]) -> str:
    """Tables for a terminal of 100 columns."""
    rows = [("engine", "model", "state", "pid", "running", "waiting", "blocks used/cached/free", "steps")]
    for engine in info["engines"]:
        blocks = engine["blocks"]
        rows.append(
            (
                engine["engine"],
                engine["model"],
                "lost" if not engine["connected"] else "draining" if engine["draining"] else "connected",
                str(engine["pid"]),
                str(engine["running"]),
                str(engine["waiting"]),
                f"{blocks['used']}/{blocks['cached']}/{blocks['free']}",
                str(engine["steps"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{url}: {', '.join(model['id'] for model in info['models'])}", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for router in info["routers"]:
        in_flight = sum(router["in_flight"].values())
        lines.append(f"{router['id']} (pid {router['pid']}): {in_flight} in work, {router['waiting']} waiting")
    lines += [f"degraded: {choice}" for choice in info["degraded"]]
    return "\n".join(lines)
