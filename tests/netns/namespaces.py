"""Network namespaces of the tests: made, joined by cables, thrown away. Needs root, `ip` and /dev/net/tun."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import struct
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

_CLONE_NEWNET = 0x4000_0000
_TUNSETIFF = 0x4004_54CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_RUN_S = 20
DEVICE = "rt0"  # the end of a veth in a namespace


@functools.cache
def why_not() -> str:
    """Why this machine can make no network namespaces, in words; empty when it can."""
    name = f"dt{os.getpid()}x"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.SubprocessError) as exc:
        return f"network namespaces cannot be made here (they need root and `ip netns`): {exc}"
    try:
        ip("-n", name, "tuntap", "add", "dev", "kv0", "mode", "tun")
        ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "kv0", "root", "blackhole")
    except (OSError, subprocess.SubprocessError) as exc:
        return f"network namespaces without tun devices or tc are not enough: {exc}"
    finally:
        ip("netns", "del", name)
    return ""


def ip(*words: str) -> str:
    """What `ip` says; CalledProcessError with its words when it fails."""
    return run("ip", *words)


def run(*words: str) -> str:
    """The output of a command that succeeded."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=_RUN_S)
    if done.returncode:
        raise subprocess.SubprocessError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def remove_stale() -> None:
    """What killed test runs left here; their engines ended with them."""
    for path in Path("/run/netns").glob("dt[0-9]*"):
        found = re.fullmatch(r"dt(\d+)[a-z]", path.name)
        if found is not None and not Path(f"/proc/{found[1]}").exists():
            with contextlib.suppress(subprocess.SubprocessError):  # of a namespace without a cable
                ip("-n", path.name, "link", "del", DEVICE)
            ip("netns", "del", path.name)


class Namespace:
    """One of them. `remove` takes its links with it; processes in it must be gone before."""

    def __init__(self, name: str) -> None:
        self.name = f"dt{os.getpid()}{name}"
        self._is_joined = False
        ip("netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *words: str) -> str:
        """`ip`, in there."""
        return ip("-n", self.name, *words)

    def tc(self, *words: str) -> str:
        """`tc`, in there."""
        return run("ip", "netns", "exec", self.name, "tc", *words)

    def command(self, words: Sequence[str]) -> list[str]:
        """How to start a process in there; it takes the place of `ip`, so that its id is the one that is started."""
        return ["ip", "netns", "exec", self.name, *words]

    def join(self, mine: str, *, other: Namespace | None, theirs: str) -> None:
        """A cable to another namespace, or to that of this process: addresses with their prefix lengths."""
        device, far = DEVICE, f"{self.name}{DEVICE}"
        self._is_joined = True
        self.ip("link", "add", device, "type", "veth", "peer", "name", far)
        where = other.name if other is not None else str(os.getpid())
        self.ip("link", "set", far, "netns", where)
        self.ip("addr", "add", mine, "dev", device)
        self.ip("link", "set", device, "up")
        there = other.ip if other is not None else ip
        there("addr", "add", theirs, "dev", far)
        there("link", "set", far, "up")

    def tun(self, device: str, mine: str, theirs: str) -> int:
        """A cable whose other end is a descriptor: what the kernel sends is read from it, packet by packet."""
        opened: list[int] = []
        thread = threading.Thread(target=self._open_tun, args=(device, opened), name="setns")
        thread.start()
        thread.join()
        (fd,) = opened
        self.ip("addr", "add", mine, "peer", theirs, "dev", device)
        self.ip("link", "set", device, "up")
        return fd

    def _open_tun(self, device: str, opened: list[int]) -> None:
        """In a thread of its own, which moves into the namespace: a tun belongs to where it was opened."""
        here = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(here, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(here)
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
        opened.append(fd)

    def remove(self) -> None:
        """Idempotent. The kernel takes a namespace apart some time later, so its cable goes first: its name and
        addresses are wanted again.
        """
        if Path(f"/run/netns/{self.name}").exists():
            if self._is_joined:
                with contextlib.suppress(subprocess.SubprocessError):  # of a cable that was never whole
                    self.ip("link", "del", DEVICE)
            ip("netns", "del", self.name)
