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
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent
_COMPILE_TIMEOUT_S = 120


class AttentionArguments(ctypes.Structure):
    """`struct attention` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "first_block", "ends", "rows")),
        *((name, ctypes.c_int64) for name in ("sequences", "query_stride", "num_blocks", "block_tokens", "window")),
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
        (name, ctypes.c_int64)
        for name in ("tokens", "heads", "head_dim", "num_blocks", "block_tokens", "k_stride", "v_stride")
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
def most_head_dim() -> int:
    """The largest head that the attention in `library` takes; 0 without it."""
    native = library()
    return 0 if native is None else ctypes.c_int32.in_dll(native, "most_head_dim").value


def check(status: int) -> None:
    """Raise what a function's answer says: the enum of cpu.c."""
    if status == 1:
        raise MemoryError("no memory for the attention of a step")
    if status == 2:
        raise IndexError("a step names a block that the arena does not have")


@cache
def _load() -> ctypes.PyDLL | str:
    if platform.system() != "Linux":
        return f"there is no native code for {platform.system()}"
    try:
        compiler = _compiler()
        ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)
        return _declare(_open(compiler))
    except LookupError as exc:
        return str(exc)
    except subprocess.CalledProcessError as exc:
        return f"{exc.cmd[0]} failed: {exc.stderr.strip()[-300:] or f'exit code {exc.returncode}'}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        return f"the native code cannot be built or loaded: {exc}"


def _compiler() -> list[str]:
    """The command that CC gives, else the first compiler there is; LookupError where there is none."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise LookupError(f"CC names {command[0]}, which is not there")
        return command
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found is None:
        raise LookupError("no C compiler was found (install gcc, or set CC)")
    return [found]


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
        write.restype = int32
    if hasattr(native, "linear_row"):
        native.linear_row.argtypes = (pointer, pointer, pointer, pointer, int32)
        native.linear_row.restype = None
    return native


def _openmp() -> str:
    """The OpenMP library that torch has loaded into this process; LookupError where it brings none."""
    torch.get_num_threads()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    for name in ("libgomp", "libiomp5", "libomp"):
        for path in sorted(paths):
            if Path(path).name.startswith(name):
                return path
    raise LookupError("torch brings no OpenMP that this process could share")


def _open(compiler: list[str]) -> ctypes.PyDLL:
    """The library built from these sources by this compiler for this CPU; built now unless the cache has it."""
    version = _run([*compiler, "--version"])
    identity = hashlib.sha256("\0".join((*compiler, version, _cpu(), *_flags())).encode())
    for source in sorted((*SOURCE.glob("*.c"), *SOURCE.glob("*.inc"))):
        identity.update(source.read_bytes())
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "native"
        target = folder / f"cpu-{identity.hexdigest()[:20]}.so"
        if target.is_file():
            return ctypes.PyDLL(str(target))
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="build-", dir=folder)
    except (OSError, RuntimeError) as exc:  # no home, or one that cannot be written: built anew in every process
        log.warning("native code is compiled at each start, as no cache can be written: %s", exc)
        with tempfile.TemporaryDirectory(prefix="diptych-native-") as place:
            return ctypes.PyDLL(str(_build(compiler, Path(place))))
    with scratch as place:
        _build(compiler, Path(place)).replace(target)  # so that nobody ever sees half of it
    log.info("compiled native code for this CPU: %s", target)
    return ctypes.PyDLL(str(target))


def _build(compiler: list[str], folder: Path) -> Path:
    compiled, built = folder / "cpu.o", folder / "cpu.so"
    _run([*compiler, *_flags(), "-c", str(SOURCE / "cpu.c"), "-o", str(compiled)])
    # Linked apart, against no OpenMP of the system: its symbols are found in the one that torch has loaded.
    _run([*compiler, "-shared", str(compiled), "-o", str(built), "-lm"])
    return built


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=_COMPILE_TIMEOUT_S
    )
    return done.stdout


def _flags() -> tuple[str, ...]:
    """-O3: with -O2 it compiles in 2 s instead of 4, and attention takes up to 1.7 times as long."""
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    return ("-std=gnu11", "-O3", "-march=native", *wide, "-fno-math-errno", "-fopenmp", "-fPIC")


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        lines = {line.strip() for line in info if line.startswith(("model name", "flags", "Features"))}
    return platform.machine() + "\n".join(sorted(lines))
