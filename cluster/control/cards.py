"""The NVIDIA cards that engines on this machine can compute on, and what keeps them from it. No torch, no ray.

Asked of the driver's own library (NVML), which takes no memory on a card, unlike a CUDA context.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LIBRARY = "libnvidia-ml.so.1"
_TEXT = 96  # bytes that NVML's names and identifiers need at most
# Compute capabilities whose multiprocessors hold the tiles of our launch tables (227 KiB of shared memory for a block).
_TAKEN = ((9, 0), (10, 0), (10, 3))


@dataclass(frozen=True, slots=True)
class Card:
    """One card. Bytes; 0 where it is a part of one (MIG), of which NVML says nothing here."""

    name: str
    total: int = 0
    free: int = 0
    uuid: str = ""
    capability: tuple[int, int] = (0, 0)  # of compute; (0, 0) where it is not known


@dataclass(frozen=True, slots=True)
class Cards:
    """What there is. Without any, `why_none` says why."""

    cards: tuple[Card, ...] = ()
    driver: str = ""
    why_none: str = ""
    is_hidden: bool = False  # there are some, which cannot be used

    @property
    def count(self) -> int:
        """Cards that can be used."""
        return len(self.cards)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def find() -> Cards:
    """Cards that an engine could use now: the driver shows them, CUDA_VISIBLE_DEVICES lets them be seen, and torch,
    Triton and the C compiler that Triton calls are there.
    """
    seen = installed()
    if not seen.cards:
        return seen
    cards = visible(seen.cards, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not cards:  # somebody's wish
        return Cards((), seen.driver, "CUDA_VISIBLE_DEVICES hides all cards")
    why = why_unusable() or _why_one_is_too_small(cards)
    return Cards(() if why else cards, seen.driver, why, is_hidden=bool(why))


@functools.cache
def is_there() -> bool:
    """Whether `find` finds any; asked once, for whoever asks often."""
    return find().count > 0


def installed() -> Cards:
    """What the driver shows, whether it can be used or not."""
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        return Cards(why_none="there is no NVIDIA driver on this machine")
    if code := nvml.nvmlInit_v2():
        return Cards(why_none=f"the NVIDIA driver does not answer (NVML error {code})")
    try:
        return _ask(nvml)
    finally:
        nvml.nvmlShutdown()


def visible(cards: Sequence[Card], listed: str | None) -> tuple[Card, ...]:
    """Those that CUDA_VISIBLE_DEVICES names, by number or identifier; None: all. CUDA stops at the first wrong name."""
    if listed is None:
        return tuple(cards)
    found = []
    for name in (part.strip() for part in listed.split(",")):
        if name.isdigit() and int(name) < len(cards):
            found.append(cards[int(name)])
        elif name.startswith("MIG-"):
            found.append(Card(name))
        elif name.startswith("GPU-") and (named := [card for card in cards if card.uuid.startswith(name)]):
            found.append(named[0])
        else:
            break
    return tuple(found)


def why_unusable() -> str:
    """What this installation lacks for any card; empty: nothing."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "the package torch is missing"
    if not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return "the installed torch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing: pip install 'diptych[gpu]'"
    return why_no_compiler()


def why_too_small(name: str, capability: tuple[int, int]) -> str:
    """Why the kernels do not run on a card of this compute capability; empty: they do, or nobody knows."""
    if capability in (*_TAKEN, (0, 0)):
        return ""
    major, minor = capability
    return (
        f"{name} has compute capability {major}.{minor}, and the kernels need the shared memory of 9.0 (H100, H200), "
        "10.0 or 10.3 (B200, B300)"
    )


def _why_one_is_too_small(cards: Sequence[Card]) -> str:
    """Ray hands out every card that is visible: one that cannot be used has to be hidden."""
    why = [why_too_small(card.name, card.capability) for card in cards]
    good = [card.uuid for card, reason in zip(cards, why, strict=True) if not reason]
    hide = f"; CUDA_VISIBLE_DEVICES={','.join(good)} hides what cannot be used" if good else ""
    return next((reason + hide for reason in why if reason), "")


def why_no_compiler() -> str:
    """Triton compiles a C function for each kernel's signature: it needs a compiler and Python's headers."""
    wanted = os.environ.get("CC")
    names = (wanted,) if wanted else ("gcc", "clang")
    if not any(shutil.which(name) for name in names):
        what = f"CC names {wanted}, which is not there" if wanted else "there is neither gcc nor clang"
        return f"Triton needs a C compiler, and {what}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"Triton compiles C code against Python's headers, and {header} is missing"


def _ask(nvml: ctypes.CDLL) -> Cards:
    text, count = ctypes.create_string_buffer(_TEXT), ctypes.c_uint()
    if nvml.nvmlSystemGetDriverVersion(text, _TEXT):
        return Cards(why_none="the NVIDIA driver does not tell its version")
    driver = text.value.decode()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    cards = []
    for index in range(count.value):
        handle, memory, major, minor = ctypes.c_void_p(), _Memory(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            continue
        nvml.nvmlDeviceGetName(handle, text, _TEXT)
        name = text.value.decode()
        nvml.nvmlDeviceGetUUID(handle, text, _TEXT)
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        capability = (major.value, minor.value)
        cards.append(Card(name, memory.total, memory.free, text.value.decode(), capability))
    return Cards(tuple(cards), driver, "" if cards else "the NVIDIA driver finds no card")
