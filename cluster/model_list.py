"""The verb `diptych models`: what can be served, what is converted, what a running cluster serves."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from diptych.cluster.client.wire import headers
from diptych.cluster.config import DiptychConfig, ModelSettings, api_key, load_config
from diptych.cluster.control.state import find_cluster
from diptych.cluster.models import built_in, resolve
from diptych.cluster.models.source import FOLDERS
from diptych.cluster.tasks import settle_tasks
from diptych.protos.errors import StartupError

TIMEOUT_S = 5.0


def run_models(config: Path | None, overrides: Sequence[str], url: str | None) -> int:
    """Print; the exit code."""
    try:
        loaded = load_config(config, overrides)
    except StartupError as error:
        print(f"diptych: {error}", file=sys.stderr)
        return 1
    print(render(loaded, served(loaded.run_dir, url)))
    return 0


def served(run_dir: Path, url: str | None) -> tuple[str, list[str]]:
    """The URL of the running cluster and its models; empty where none answers."""
    state = find_cluster(run_dir, url) if url is None else None
    url = url or (state.url if state is not None else "")
    if not url:
        return "", []
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/v1/models", headers=headers("", api_key()))
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return url, [str(card["id"]) for card in json.load(reply)["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return url, []


def render(config: DiptychConfig, running: tuple[str, list[str]]) -> str:
    """A list per kind."""
    lines = ["built in"]
    lines += [f"  {name}" for name in built_in()]
    lines.append("\nconfigured (diptych serve)")
    for name, settings in config.models.items():
        settings = _settled(name, settings, config)
        pools = ", ".join(f"{engines} {role}" for role, engines in settings.pools().items())
        kind = settings.task if settings.task in ("embed", "rerank") else settings.layout
        lines.append(f"  {name}: {settings.source}, {kind}: {pools}")
    lines.append(f"\nconverted, in {config.cache_dir / 'models'}")
    folders = converted(config.cache_dir)
    lines += [f"  {name}: {size / 1e6:,.0f} MB, from {origin}" for name, size, origin in folders] or ["  none"]
    url, names = running
    lines.append(f"\nserved now{f', at {url}' if url else ''}")
    lines += [f"  {name}" for name in names] or ["  none"]
    return "\n".join(lines)


def _settled(name: str, settings: ModelSettings, config: DiptychConfig) -> ModelSettings:
    """With its task, where a folder that is there tells it: nothing is converted or fetched for a list."""
    if settings.task != "auto" or not (Path(settings.source).is_dir() or settings.source in FOLDERS):
        return settings
    one = config.model_copy(update={"models": {name: settings}})
    try:
        folder = resolve(settings.source, config.cache_dir, has_weights=settings.has_weights)
        return settle_tasks(one, {name: folder}).models[name]
    except StartupError:  # which `diptych doctor` and `diptych serve` tell
        return settings


def converted(cache_dir: Path) -> list[tuple[str, int, str]]:
    """(folder, bytes on disk, file it was made from) of every conversion; one that is being made does not count."""
    found = []
    for source in sorted(cache_dir.glob("models/[!.]*/source.json")):
        try:
            origin = str(json.loads(source.read_text(encoding="utf-8"))["file"])
            size = sum(file.stat().st_size for file in source.parent.iterdir())
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append((source.parent.name, size, origin))
    return found
