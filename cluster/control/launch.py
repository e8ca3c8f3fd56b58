"""Ray for one cluster: a head of our own as a child process, or a cluster that we were told to join. Never one that
merely happens to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from diptych.cluster.config import RaySettings
from diptych.protos.errors import StartupError

from .host import free_ports

_PR_SET_PDEATHSIG = 1
_TERM_GRACE_S = 8.0
_KILL_GRACE_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class RayHead:
    """Our own Ray: its first process, which takes everything else down with it, and how to reach it."""

    process: subprocess.Popen[bytes]
    address: str
    client_address: str  # for `ray.init`, from Python processes that are no part of the cluster
    token_path: Path
    log: Path

    def stop(self) -> None:
        """End every process of this Ray; returns when all are gone."""
        end_tree(self.process)


def ray_environment(token_path: Path) -> dict[str, str]:
    """Variables for every process of our own Ray, the driver included."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Its agent would serve Ray's metrics on a port that asks for no token; ours are the routers'.
        "RAY_enable_metrics_collection": "0",
        "DASHBOARD_METRIC_PORT": "-1",  # so would its head: no such port can be opened, and it goes on without
        # Off, this variable makes Ray treat the machine as a cluster of its own and bind to loopback only. On Linux
        # nothing else depends on it; without it Ray replaces 127.0.0.1 by the address of the network card.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's client proxy forks a server per client while its other threads are in gRPC; with gRPC's handlers around
        # the fork that child sometimes dies at once, and the client waits half a minute for an error.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        # On SIGTERM end now: who could move elsewhere has been drained, and a single node has no elsewhere.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def start_ray(folder: Path, settings: RaySettings, num_gpus: int) -> RayHead:
    """Start a head below `folder` that has so many of the machine's cards, and wait until it can be joined. Raises
    StartupError with Ray's own last words.
    """
    token_path = folder / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32), encoding="ascii")
    environment = ray_environment(token_path)
    # For this process too: Ray reads them when it is first imported.
    os.environ |= environment
    log = folder / "ray.log"
    client, dashboard, agent = free_ports(3)
    ports = {"dashboard-port": dashboard, "dashboard-agent-listen-port": agent, "ray-client-server-port": client}
    process = spawn(_command(folder, settings, num_gpus, ports), log, environment)
    address_file = folder / "ray" / "ray_current_cluster"
    deadline = time.monotonic() + settings.start_timeout_s
    try:
        while not (address_file.exists() and (address := address_file.read_text().strip())):
            if process.poll() is not None:
                raise StartupError(f"Ray did not start (exit code {process.returncode}): {_last_words(log)}")
            if time.monotonic() > deadline:
                raise StartupError(
                    f"Ray did not come up within {settings.start_timeout_s:g} s; on a slow machine raise "
                    f"ray.start_timeout_s. {_last_words(log)}"
                )
            time.sleep(_POLL_S)
    except BaseException:
        end_tree(process)
        raise
    return RayHead(process, address, f"ray://127.0.0.1:{client}", token_path, log)


def end_tree(process: subprocess.Popen[bytes], grace_s: float = _TERM_GRACE_S) -> None:
    """End a child and its descendants: politely, then after `grace_s` for good. By pid, never by name."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_KILL_GRACE_S)
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for survivor in alive:
        survivor.kill()
    psutil.wait_procs(alive, timeout=_KILL_GRACE_S)


def _command(folder: Path, settings: RaySettings, num_gpus: int, ports: Mapping[str, int]) -> list[str]:
    options = {
        "port": 0,
        "temp-dir": folder / "ray",
        "include-dashboard": "false",
        "include-log-monitor": "false",
        **ports,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "object-store-memory": settings.object_store_mib << 20,
        "num-gpus": num_gpus,
    }
    flags = ["--head", "--block", "--disable-usage-stats", "--no-monitor"]
    start = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start"]
    return [*start, *flags, *(f"--{name}={value}" for name, value in options.items())]


def spawn(command: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A child in a session of its own that the kernel ends when this process dies. Call from the main thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,  # the terminal's Ctrl-C is for us alone
            preexec_fn=die_with_parent,
        )


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "it said nothing"


def kill_family() -> None:
    """End all descendants of this process at once."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
