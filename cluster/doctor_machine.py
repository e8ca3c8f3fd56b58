"""What `diptych doctor` asks of the machine and the installation, whatever the configuration says."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from packaging.requirements import Requirement

from diptych.cluster.control import cards, host

MIN_PYTHON = (3, 11)
MIN_FILES = 1024  # of the router: connections, and of Ray's processes about as many
MIN_SHM = 128 << 20  # Ray's object store and a staging ring
HEAVY = ("torch", "transformers", "ray.serve", "grpc", "tokenizers", "safetensors.torch")
IMPORT_TIMEOUT_S = 120.0
_ASK_TORCH = "import torch; print(torch.__version__, 'for CUDA', torch.version.cuda, torch.cuda.device_count())"
_REMEDIES = {  # of what cards.why_unusable tells
    "built without CUDA": "install a torch with CUDA (its download page has the command for this driver)",
    "triton is missing": "pip install 'diptych[gpu]'",
    "C compiler": "install gcc (apt install gcc), or let CC name a compiler",
    "Python.h": "install Python's headers (apt install python3-dev)",
}


class State(StrEnum):
    """What a finding means for a start."""

    OK = "ok"
    SLOW = "note"  # it starts, and is slower, smaller or less safe than it could be
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` says what to do where there is something to do."""

    name: str
    state: State
    told: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings about this machine."""
    return [
        system(platform.system(), sys.version_info[:2]),
        *packages(),
        imports(HEAVY),
        bfloat16(host.has_native_bfloat16()),
        native_code(),
        *gpu(cards.installed(), usable := cards.find()),
        *(torch_on(usable) if usable.cards else []),
        cores(len(os.sched_getaffinity(0)), cpu_quota()),
        files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        shared_memory(),
    ]


def system(name: str, python: Sequence[int]) -> Finding:
    """Linux and a Python that is new enough."""
    version = ".".join(map(str, python))
    if name != "Linux":
        return Finding("system", State.STOP, f"{name} has no memfd and no /proc", "use Linux, also in a container")
    if tuple(python) < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Finding("system", State.STOP, f"Python {version} is older than {wanted}", f"install Python {wanted}")
    return Finding("system", State.OK, f"Linux, Python {version}")


def packages(distribution: str = "diptych") -> list[Finding]:
    """A finding for every requirement that is missing or too old, or one that all are there."""
    found, wrong = [], []
    for text in importlib.metadata.requires(distribution) or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(Finding("package", State.STOP, f"{wanted.name} is missing", f"pip install '{wanted}'"))
            continue
        if wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} {version}")
        else:
            told = f"{wanted.name} {version} is installed, and {wanted.specifier} is needed"
            wrong.append(Finding("package", State.STOP, told, f"pip install '{wanted}'"))
    return wrong or [Finding("packages", State.OK, ", ".join(found))]


def imports(modules: Sequence[str]) -> Finding:
    """Whether the large packages can be loaded, in a process of its own: a broken one may take its process along."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {', '.join(modules)}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        told = f"{', '.join(modules)} could not be imported within {IMPORT_TIMEOUT_S:g} s"
        return Finding("imports", State.SLOW, told, "see whether the disk is slow or the machine busy")
    if done.returncode == 0:
        return Finding("imports", State.OK, ", ".join(modules))
    words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return Finding("imports", State.STOP, words[0], "install the named package again")


def bfloat16(is_native: bool) -> Finding:
    """What dtype auto means here."""
    if is_native:
        return Finding("bfloat16", State.OK, "this CPU computes in bfloat16")
    return Finding("bfloat16", State.SLOW, "this CPU does not: models run in float32, with twice the memory")


def native_code(module: str = "diptych.kernels.native.build") -> Finding:
    """Whether the C code for single tokens can be compiled, which is tried, in a process of its own as above."""
    name, command = "C compiler", f"from {module} import why_missing; print(why_missing() or '')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        told = lines[-1] if lines else "" if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        told = f"it took longer than {IMPORT_TIMEOUT_S:g} s"
    if not told:
        return Finding(name, State.OK, "the native code for this CPU is built")
    remedy = (
        "install gcc 9 or newer with the C library's headers (apt install gcc libc6-dev), or let CC name a compiler"
    )
    return Finding(name, State.SLOW, f"tokens are computed more slowly, without native code: {told}", remedy)


def gpu(there: cards.Cards, usable: cards.Cards) -> list[Finding]:
    """The cards and the driver, what of their memory is free, and what keeps engines from computing on them."""
    if not there.cards:
        return [Finding("GPU", State.OK, f"none: {there.why_none}; engines compute on the CPU")]
    told = f"{', '.join(_card(card) for card in there.cards)}; driver {there.driver}"
    if not usable.is_hidden:
        if not usable.cards:
            return [Finding("GPU", State.OK, f"{told}; {usable.why_none}, so engines compute on the CPU")]
        hidden = there.count - usable.count
        return [Finding("GPU", State.OK, told + (f"; CUDA_VISIBLE_DEVICES hides {hidden}" if hidden > 0 else ""))]
    remedy = next((words for sign, words in _REMEDIES.items() if sign in usable.why_none), "")
    return [
        Finding("GPU", State.OK, told),
        Finding("GPU use", State.SLOW, f"engines compute on the CPU: {usable.why_none}", remedy),
    ]


def torch_on(usable: cards.Cards, code: str = _ASK_TORCH) -> list[Finding]:
    """Whether torch finds the cards that the driver shows, in a process of its own: a CUDA context takes memory."""
    name, remedy = "torch", "install a torch for this driver, or set models.NAME.device: cpu"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [
            Finding(name, State.SLOW, f"it was not loaded within {IMPORT_TIMEOUT_S:g} s", "see what keeps the disk")
        ]
    version, _, count = done.stdout.strip().rpartition(" ")
    if done.returncode != 0 or not count.isdigit():
        words = done.stderr.strip().splitlines()[-1:] or [f"it said {done.stdout.strip()[:80]!r}"]
        return [Finding(name, State.STOP, words[0], remedy)]
    told = f"{version} finds {count} of {usable.count} cards (driver {usable.driver})"
    if int(count) < usable.count:
        return [Finding(name, State.STOP, told, remedy)]
    return [Finding(name, State.OK, told)]


def _card(card: cards.Card) -> str:
    return f"{card.name} with {card.free / 2**30:.1f} of {card.total / 2**30:.1f} GiB free"


def cores(usable: int, quota: float | None) -> Finding:
    """Cores against a container's limit of CPU time."""
    if quota is not None and quota < usable:
        told = f"{usable} cores are visible, and the container (cgroup) may use the time of {quota:g}"
        remedy = f"set models.NAME.prefill.threads and decode.threads so that they add up to {max(1, int(quota))}"
        return Finding("cores", State.SLOW, told, remedy)
    return Finding("cores", State.OK, f"{usable} usable; engines divide them and set OMP_NUM_THREADS themselves")


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of CPU time that the cgroup grants, or None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or the word max
        return None


def files(soft: int) -> Finding:
    """The limit of open files of a process."""
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        told = f"a process may open {soft} files; router and Ray need {MIN_FILES}"
        return Finding("open files", State.STOP, told, f"ulimit -n {MIN_FILES} (or LimitNOFILE of the service)")
    return Finding("open files", State.OK, "no limit" if soft == resource.RLIM_INFINITY else str(soft))


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Memory that two processes can share: memfd for KV, /dev/shm for Ray."""
    try:
        os.close(os.memfd_create("diptych-doctor"))
    except OSError as error:
        told = f"memfd_create fails ({error.strerror}): KV crosses over gRPC instead"
        return Finding("shared memory", State.SLOW, told, "allow memfd_create (seccomp profile of the container)")
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = 0
    if free < MIN_SHM:
        told = f"{folder} has {free >> 20} MiB free, and Ray wants {MIN_SHM >> 20}"
        return Finding("shared memory", State.SLOW, told, "docker run --shm-size=256m; Ray uses the disk otherwise")
    return Finding("shared memory", State.OK, f"memfd works, {folder} has {free >> 20:,} MiB free")
