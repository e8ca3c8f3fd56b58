"""The verb `diptych apply`: another configuration for a cluster that serves.

The engines that it changes are replaced while the old ones serve. What only a new cluster can have is refused by name.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.cluster.config import DiptychConfig, load_config
from diptych.cluster.control.state import ClusterState, read_config, write_config
from diptych.protos.errors import DiptychError, StartupError

CALL_TIMEOUT_S = 3600.0  # the manager has time limits of its own for engines that start and that drain
# What engines alone know. Routers, and pairs of engines and routers that find each other, know the rest.
_OF_A_MODEL = frozenset({"device", "gpu_share", "deterministic", "dtype", "echo", "kv", "prefill", "decode"})
_OF_THE_CLUSTER = frozenset({"transfer"})


def run_apply(config: Path | None = None, overrides: Sequence[str] = (), *, url: str | None = None) -> int:
    """Apply a file, or changes to what runs; the exit code."""
    began = time.monotonic()
    try:
        from diptych.cluster.control.connect import running_cluster

        own = [override for override in overrides if override.partition("=")[0].strip() == "run_dir"]
        state = running_cluster(url, load_config(config, own).run_dir)
        before = read_config(state)
        after = load_config(config, overrides) if config is not None else _changed(state, overrides)
        after = _with_found_tasks(after, before)
        names = differences(before.model_dump(mode="json"), after.model_dump(mode="json"))
        if not names:
            print("nothing to change: the cluster has this configuration")
            return 0
        if fixed := [name for name in names if not _is_of_engines(name, after)]:
            raise StartupError(
                f"{', '.join('.'.join(name) for name in fixed)}: a cluster that serves keeps "
                f"{'this' if len(fixed) == 1 else 'these'}; stop it and start it with the new configuration"
            )
        return _apply(state, after, began)
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Where two trees differ, as paths of keys; a key that one of them lacks is one."""
    found: list[tuple[str, ...]] = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [(key, *rest) for rest in differences(old, new)]
        elif old != new or (key in before) != (key in after):
            found.append((key,))
    return found


def _with_found_tasks(after: DiptychConfig, before: DiptychConfig) -> DiptychConfig:
    """`task: auto` is what was found of the same model when the cluster started."""
    models = dict(after.models)
    for name, settings in after.models.items():
        runs = before.models.get(name)
        if runs is not None and settings.task == "auto":
            models[name] = settings.model_copy(update={"task": runs.task})
    return after.model_copy(update={"models": models})


def _changed(state: ClusterState, overrides: Sequence[str]) -> DiptychConfig:
    if not overrides:
        raise StartupError("say what to change: --config FILE, --set KEY=VALUE, or both")
    return load_config(state.config_file, overrides)


def _is_of_engines(name: tuple[str, ...], config: DiptychConfig) -> bool:
    if name[0] == "models":
        return len(name) > 2 and name[1] in config.models and name[2] in _OF_A_MODEL
    return name[0] in _OF_THE_CLUSTER


def _apply(state: ClusterState, config: DiptychConfig, began: float) -> int:
    from diptych.cluster.control import connect, host
    from diptych.cluster.control.memory import plan_memory
    from diptych.cluster.control.plan import plan_cluster
    from diptych.cluster.models import resolve

    folders = {
        name: resolve(settings.source, config.cache_dir, print, echo=settings.echo, has_weights=settings.has_weights)
        for name, settings in config.models.items()
    }
    plan = plan_cluster(config, folders, Path(state.folder))
    handle = connect.manager(url=state.url, run_dir=Path(state.folder).parent)
    held = connect.engine_pids(handle, timeout_s=CALL_TIMEOUT_S)
    plan_memory(plan.engines(), host.memory_with(held), ray_is_ours=False).check()
    done = connect.apply(handle, plan, timeout_s=CALL_TIMEOUT_S)
    for engine in done.started:
        print(f"{engine.info.ref.engine_id} is ready (pid {engine.info.pid})")
    for name in done.ended:
        print(f"{name} has finished its requests and ended")
    for sentence in done.failed:
        print(f"diptych: {sentence}; the engines before it go on", file=sys.stderr)
    write_config(state, config)
    print(f"{len(done.started)} engines started, {len(done.ended)} ended: {time.monotonic() - began:.1f} s")
    return 1 if done.failed else 0
