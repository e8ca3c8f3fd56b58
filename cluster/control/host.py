"""What this machine offers: memory within the cgroup's limit, what the CPU can do, free ports. No torch, no ray."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 twice, then arm64


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """Bytes that new processes may take, and what sets that bound: the machine or a cgroup limit."""
    free = psutil.virtual_memory().available
    bound = "free memory of the machine"
    for limit_file, used_file in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # absent, or the word max: no limit
            left = int((cgroup / limit_file).read_text()) - int((cgroup / used_file).read_text())
            left += _reclaimable(cgroup / Path(limit_file).parent / "memory.stat")
            if left < free:
                free, bound = max(left, 0), "the memory limit of the container (cgroup)"
    return free, bound


def memory_with(pids: Sequence[int]) -> tuple[int, str]:
    """`available_memory()` and what these processes hold now."""
    free, bound = available_memory()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            free += psutil.Process(pid).memory_info().rss
    return free, bound


def _reclaimable(stat: Path) -> int:
    """Bytes of file cache that the kernel gives back first; they count as used."""
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def has_native_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 itself; without that, float32 is faster."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return not _BF16_FLAGS.isdisjoint(flags.split())
    return False


def is_port_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def is_reachable(address: str, timeout_s: float = 5.0) -> bool:
    """Whether something listens at host:port."""
    name, _, port = address.rpartition(":")
    try:
        socket.create_connection((name.strip("[]"), int(port)), timeout_s).close()
    except (OSError, OverflowError):
        return False
    return True


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        probes = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
