"""Where other commands find a running cluster: one private folder per `diptych serve`, with a state file in it.

run_dir/<pid>/: state.json, config.json, token, ray/ (Ray's session), ray.log, *.sock
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from diptych.cluster.config import DiptychConfig, load_config
from diptych.protos.errors import StartupError

STATE_FILE = "state.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """What one needs to talk to a running cluster. `token_path` and `ray_client_address` are None when the
    Ray cluster is somebody else's."""

    pid: int  # of `diptych serve`
    url: str  # of the API
    serve_url: str  # the same through Ray Serve's proxy
    ray_address: str
    ray_client_address: str | None  # ray://host:port
    token_path: str | None
    folder: str
    models: tuple[str, ...]

    @property
    def config_file(self) -> Path:
        """What it was started with, and what was applied since."""
        return Path(self.folder) / CONFIG_FILE


def make_folder(run_dir: Path, name: str = "") -> Path:
    """A private folder for this process below `run_dir`; folders whose process is gone are removed.

    With a `name` it is that of a deployment, outlives this process, and is taken as it is when it is there.

    Raises StartupError when `run_dir` belongs to somebody else or others may write to it.
    """
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = run_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise StartupError(
                f"{run_dir} must be a folder of your own that nobody else can enter (mode 700); "
                "set run_dir to another one"
            )
        _sweep(run_dir)
        folder = run_dir / (name or str(os.getpid()))
        if not name:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, exist_ok=bool(name))
    except OSError as exc:
        raise StartupError(f"cannot create a folder below run_dir {run_dir}: {exc.strerror}") from exc
    return folder


def write_state(state: ClusterState) -> None:
    """Publish; a reader sees all of it or nothing."""
    _publish(Path(state.folder) / STATE_FILE, json.dumps(asdict(state)))


def write_config(state: ClusterState, config: DiptychConfig) -> None:
    """Beside the state, what was written of it: a default may not be written where it does not apply, such as a prefill
    pool of a colocated layout. No secrets are in it, only the names of their files.
    """
    _publish(state.config_file, config.model_dump_json(exclude_unset=True))


def read_config(state: ClusterState) -> DiptychConfig:
    """Raises StartupError when it cannot be read."""
    return load_config(state.config_file)


def _publish(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def find_cluster(run_dir: Path, url: str | None = None) -> ClusterState | None:
    """The cluster below `run_dir` (at `url`, if given) that was started last and whose process lives, or None."""
    files = sorted(run_dir.glob(f"*/{STATE_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for file in files:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            raw = json.loads(file.read_text(encoding="utf-8"))
            state = ClusterState(**(raw | {"models": tuple(raw["models"])}))
            if _lives(state.pid) and url in (None, state.url):
                return state
    return None


def dead_folders(run_dir: Path) -> list[Path]:
    """Folders below `run_dir` whose process is gone."""
    if not run_dir.is_dir():
        return []
    return [folder for folder in run_dir.iterdir() if folder.name.isdigit() and not _lives(int(folder.name))]


def _sweep(run_dir: Path) -> None:
    for folder in dead_folders(run_dir):
        shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    """A killed process that nobody has waited for still has its pid, and serves nothing."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
