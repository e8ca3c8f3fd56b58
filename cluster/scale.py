"""The verbs `diptych scale`, `diptych restart` and `diptych role`: ask the pool manager for other sizes, other engines
or another role of one, and tell what came of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cluster.config import load_config
from diptych.protos.errors import DiptychError, StartupError
from diptych.protos.types import Role

if TYPE_CHECKING:
    from diptych.cluster.control.scaled import Scaled

CALL_TIMEOUT_S = 3600.0  # the manager has time limits of its own for engines that start and that drain


def run_scale(
    model: str,
    sizes: dict[Role, int],
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    url: str | None = None,
    address: str | None = None,
) -> int:
    """Change the pools of `model` one after the other; the exit code. `address` is a Ray cluster's, see `connect`."""
    try:
        if not sizes:
            raise StartupError("say what to change: --prefill N, --decode N, or --embed N")
        from diptych.cluster.control.connect import manager

        handle = manager(address, url, load_config(config, overrides).run_dir)
        code = 0
        for role, engines in sizes.items():
            code |= _scale(handle, model, role, engines)
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    return code


def run_restart(
    model: str | None,
    role: Role | None,
    *,
    router: bool = False,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    url: str | None = None,
    address: str | None = None,
) -> int:
    """Replace the engines of a model (None: all) and role (None: both) one by one, then, when neither is named, the
    router; with `router` that alone. The exit code.
    """
    try:
        if router and not (model is None and role is None):
            raise StartupError("--router is the router of all models and roles: name none beside it")
        from diptych.cluster.control.connect import manager, restart, restart_router

        handle = manager(address, url, load_config(config, overrides).run_dir)
        failed = False
        if not router:
            began = time.monotonic()
            done = restart(handle, model, role, timeout_s=CALL_TIMEOUT_S)
            _print_done(done)
            print(f"{len(done.started)} engines started, {len(done.ended)} ended: {time.monotonic() - began:.1f} s")
            failed = bool(done.failed)
        if router or (model is None and role is None):
            began = time.monotonic()
            old, new = restart_router(timeout_s=CALL_TIMEOUT_S)
            print(f"the router is another process (pid {new}, before {old}): {time.monotonic() - began:.1f} s")
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def run_role(
    engine: str,
    role: Role,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    url: str | None = None,
    address: str | None = None,
) -> int:
    """Give an engine another role without loading its model again; the exit code."""
    try:
        from diptych.cluster.control.connect import manager, set_role

        handle = manager(address, url, load_config(config, overrides).run_dir)
        began = time.monotonic()
        info = set_role(handle, engine, role, timeout_s=CALL_TIMEOUT_S)
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    print(f"{engine} is a {'-'.join(sorted(info.roles))} engine now: {time.monotonic() - began:.1f} s")
    return 0


def _scale(handle: Any, model: str, role: Role, engines: int) -> int:
    from diptych.cluster.control.connect import scale

    began = time.monotonic()
    done = scale(handle, model, role, engines, timeout_s=CALL_TIMEOUT_S)
    _print_done(done)
    if not (done.started or done.ended or done.failed):
        print(f"the {role} pool of {model} has {engines} already")
    else:
        print(f"{role} pool of {model}: {time.monotonic() - began:.1f} s")
    return 1 if done.failed else 0


def _print_done(done: Scaled) -> None:
    for engine in done.started:
        print(f"{engine.info.ref.engine_id} is ready (pid {engine.info.pid})")
    for name in done.ended:
        print(f"{name} has finished its requests and ended")
    for sentence in done.failed:
        print(f"diptych: {sentence}", file=sys.stderr)
