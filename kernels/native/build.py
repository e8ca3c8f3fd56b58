"""Compiles cpu.c for this machine at first use, keeps it in the user's cache and loads it.

The compiler is asked for, not required: Triton needs one on a GPU for the same reason. Without one the operations stay
torch's, and `why_missing` says so. The code runs in torch's own OpenMP threads: a second team would fight with them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fopenmp", "-fPIC")
_COMPILE_TIMEOUT_S = 120


class AttentionArguments(ctypes.Structure):
    """`struct attention` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "first_block", "ends", "rows")),
        *((name, ctypes.c_int64) for name in ("sequences", "query_stride", "block_tokens", "window")),
        ("sinks", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_dim")),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class LinearArguments(ctypes.Structure):
    """`struct linear` of linear.inc."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("outs", "ins", "ins_padded", "width")),
        ("operation", ctypes.c_int32),
    )


class KvShape(ctypes.Structure):
    """`struct kv_shape` of cpu.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("tokens", "heads", "head_dim", "block_tokens", "k_stride", "v_stride")
    )


@cache
def library() -> ctypes.PyDLL | None:
    """The compiled functions, or None where they cannot be made; then `why_missing` has the reason.

    Calls keep the interpreter's lock: most last microseconds, and giving it away after each costs more than that.
    """
    loaded = _load()
    return loaded if isinstance(loaded, ctypes.PyDLL) else None


def why_missing() -> str | None:
    """None when `library` is there, else what stands in its way, in words."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def has_linear() -> bool:
    """Whether this CPU multiplies bfloat16 numbers (AVX512-BF16)."""
    native = library()
    return native is not None and hasattr(native, "linear_row")


@cache
def _load() -> ctypes.PyDLL | str:
    if platform.system() != "Linux":
        return f"there is no native code for {platform.system()}"
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "no C compiler was found (install gcc, or set CC)"
    runtime = _openmp()
    if runtime is None:
        return "torch brings no OpenMP that this process could share"
    try:
        path = _compiled(compiler)
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        native = ctypes.PyDLL(str(path))
    except subprocess.CalledProcessError as exc:
        return f"{compiler} failed: {exc.stderr.strip()[-300:]}"
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"the native code cannot be built or loaded: {exc}"
    return _declare(native)


def _declare(native: ctypes.PyDLL) -> ctypes.PyDLL:
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for kind in ("f32", "bf16"):
        attend, norm = getattr(native, f"attend_{kind}"), getattr(native, f"rms_norm_{kind}")
        attend.argtypes = (pointer, pointer, pointer, pointer, pointer, int32)
        attend.restype = int32
        norm.argtypes = (pointer, pointer, pointer, ctypes.c_float, int64, int64, int64, int32)
        norm.restype = None
        rotate, write = getattr(native, f"rotate_{kind}"), getattr(native, f"kv_write_{kind}")
        rotate.argtypes = (pointer, pointer, pointer, int64, int64, int64, int64, int32)
        rotate.restype = None
        write.argtypes = (pointer, pointer, pointer, pointer, pointer, pointer, pointer)
        write.restype = None
    if hasattr(native, "linear_row"):
        native.linear_row.argtypes = (pointer, pointer, pointer, pointer, int32)
        native.linear_row.restype = None
    return native


def _openmp() -> str | None:
    """The OpenMP library that torch has loaded into this process."""
    torch.get_num_threads()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    names = ("libgomp", "libiomp5", "libomp")
    return next((path for name in names for path in sorted(paths) if Path(path).name.startswith(name)), None)


def _compiled(compiler: str) -> Path:
    """The library built from these sources by this compiler for this CPU; built now unless the cache has it."""
    sources = sorted((*SOURCE.glob("*.c"), *SOURCE.glob("*.inc")))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    identity = hashlib.sha256("\0".join((version, _cpu(), *_FLAGS)).encode())
    for source in sources:
        identity.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "native"
    target = folder / f"cpu-{identity.hexdigest()[:20]}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=folder)
    except OSError:  # a home that cannot be written: built anew in every process
        scratch = tempfile.mkdtemp(prefix="diptych-native-")
        target = Path(scratch) / target.name
    built, compiled = Path(scratch) / "built.so", Path(scratch) / "cpu.o"
    # Linked apart, against no OpenMP of the system: its symbols are found in the one that torch has loaded.
    for arguments in (
        (*_FLAGS, "-c", str(SOURCE / "cpu.c"), "-o", str(compiled)),
        ("-shared", str(compiled), "-o", str(built), "-lm"),
    ):
        subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=_COMPILE_TIMEOUT_S)
    built.replace(target)
    if target.parent != Path(scratch):
        shutil.rmtree(scratch, ignore_errors=True)
    log.info("compiled native code for this CPU: %s", target)
    return target


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        lines = {line.strip() for line in info if line.startswith(("model name", "flags", "Features"))}
    return platform.machine() + "\n".join(sorted(lines))
