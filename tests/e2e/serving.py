"""`diptych serve` as a child process, spoken to over HTTP only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 240  # start-up takes 20 s on quiet cores and many times that on busy ones
STOP_TIMEOUT_S = 60


@dataclass
class Cluster:
    """A running `diptych serve` and what it printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    tree: set[int]  # every process that the start-up made

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return str(reply.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    def printed(self) -> str:
        return self.log.read_text()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def descendants(pid: int) -> set[int]:
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def alive(pids: set[int]) -> list[str]:
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{pid} {' '.join(process.cmdline())[:100]}")
        except psutil.NoSuchProcess:
            pass
    return found


def start_cluster(folder: Path, *options: str, wait: bool = True) -> Cluster:
    """Start `diptych serve` with the options; by default wait, as a user does, until it says that it is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("diptych")), "serve", "--port", str(port), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    cluster = Cluster(f"http://127.0.0.1:{port}", process, log, set())
    deadline = time.monotonic() + START_TIMEOUT_S
    while wait and f"\nready: {cluster.url} " not in cluster.printed():
        if process.poll() is not None or time.monotonic() > deadline:
            stop_cluster(cluster)
            raise AssertionError(f"serve did not become ready:\n{cluster.printed()}")
        time.sleep(0.25)
    if wait:
        assert cluster.get("/ready")["ready"] is True, "the router contradicts `diptych serve`"
    cluster.tree = descendants(process.pid)
    return cluster


def stop_cluster(cluster: Cluster, how: signal.Signals = signal.SIGINT) -> int:
    """End it as Ctrl-C would, and return the exit code."""
    cluster.tree |= descendants(cluster.process.pid)
    if cluster.process.poll() is None:
        os.kill(cluster.process.pid, how)
    try:
        return cluster.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        for pid in cluster.tree:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"serve did not end in {STOP_TIMEOUT_S} s:\n{cluster.printed()}") from None
