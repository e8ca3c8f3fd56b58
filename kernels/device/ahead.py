"""Compiles the kernels of a model's steps while its weights are loaded: on all cores, and before anything needs them.

A few layers of the same shape stand in for the model. Their steps are rehearsed with every launch taken for a wish.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from ..model import DTYPES, hand_written
from ..models.by_hand import load_by_hand
from ..models.shape import DecoderShape, read_shape
from ..ops.compiled import ahead
from .build import StepLimits, build_runner
from .runner import DeviceOptions

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadOf:
    """What is to be compiled for."""

    folder: Path
    dtype: str
    device: str
    deterministic: bool
    limits: StepLimits


class KernelsAhead:
    """`begin` once, then `join`. What fails here is left to the rehearsal, which compiles what is missing."""

    def __init__(self, wanted: AheadOf) -> None:
        """Raises GenericOnly where transformers' code computes: it needs few kernels of ours."""
        config = json.loads((wanted.folder / "config.json").read_text(encoding="utf-8"))
        self.shape = stand_in(read_shape(config))
        self._wanted = wanted
        self._thread = threading.Thread(target=self._run, name="kernels-ahead", daemon=True)

    def begin(self) -> None:
        """In a thread of its own, with memory for the stand-in and its largest step."""
        self._thread.start()

    def join(self) -> None:
        """Returns when all is compiled and the stand-in's memory is free again."""
        self._thread.join()
        gc.collect()
        torch.cuda.empty_cache()

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(_threads(), initializer=self._enter) as pool, ahead(_Ready(pool)):
                rehearse(self.shape, self._wanted)
        except Exception:
            log.info("kernels are compiled as they are needed", exc_info=True)

    def _enter(self) -> None:
        if torch.device(self._wanted.device).type == "cuda":
            torch.cuda.set_device(self._wanted.device)


class _Ready(Executor):
    """Whose kernels are on the device, with their launchers, when they are done: gcc takes as long as Triton."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Of functions that compile a kernel."""

        def ready() -> _T:
            kernel = fn(*args, **kwargs)
            getattr(kernel, "run", None)  # made when it is first looked at
            return kernel

        return self._pool.submit(ready)


def stand_in(shape: DecoderShape) -> DecoderShape:
    """The same with two layers of each kind that it has. The last one's kind comes last, as it is computed apart."""
    kinds = list(zip(shape.windows, shape.sparse, strict=True))
    few = [kind for kind in dict.fromkeys(kinds) if kind != kinds[-1]] + [kinds[-1]]
    windows, sparse = zip(*(few * 2), strict=True)
    return replace(shape, layers=len(windows), windows=windows, sparse=sparse)


def rehearse(shape: DecoderShape, wanted: AheadOf) -> None:
    """Every kind of step of a model of that shape with random weights, on an arena of one block."""
    dtype, device = DTYPES[wanted.dtype], torch.device(wanted.device)
    with torch.inference_mode():
        by_hand = load_by_hand(wanted.folder, shape, dtype=dtype, device=device, random_seed=0)
        if by_hand.slow:  # what goes by definition reads what kernels were to leave
            return
        model = hand_written(by_hand, dtype=wanted.dtype, deterministic=wanted.deterministic)
        block = (1, model.kv_heads, wanted.limits.block_tokens, model.head_dim)

        def zeros() -> torch.Tensor:
            return torch.zeros(block, dtype=dtype, device=device)

        kv = [(zeros(), zeros()) for _ in range(model.layers)]
        build_runner(model, kv, wanted.limits, DeviceOptions(graphs=False)).rehearse()


def _threads() -> int:
    return max(1, len(os.sched_getaffinity(0)) - 1)
