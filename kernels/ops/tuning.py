"""Finds rows of the launch tables by timing, for `diptych bench kernels --tune` alone: a start never tunes.

A configuration that gives a wrong answer, or none, is out: compilers have been wrong for single tile sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from .cases import Trial
from .configs import LIBRARY, Config, write_tuned
from .measure import calls_over, input_sets, microseconds

_TOLERANCE = 1e-2  # of the norm; bfloat16 outputs have 3e-3
_ROUNDS = 5
_GAIN = 0.98  # of the library's time: what a kernel must reach to take its place


def tune(trials: Iterable[Trial], tell: Callable[[str], None]) -> None:
    """Time every configuration of every trial, tell the best, and keep them in the card's file."""
    rows: dict[str, dict[tuple[int, ...], Config]] = {}
    for trial in trials:
        times = _times(trial)
        if not times:
            raise RuntimeError(f"{trial.op} {trial.shape}: no configuration gives the right answer")
        best = min(times, key=lambda config: times[config])
        if LIBRARY in times and times[best] > _GAIN * times[LIBRARY]:
            best = LIBRARY
        rows.setdefault(trial.op, {})[trial.shape] = best
        library = f", library {times[LIBRARY]:.2f}" if LIBRARY in times else ""
        rate = trial.size_bytes / times[best] / 1e3
        tell(f"{trial.op} {trial.shape}: {times[best]:.2f} us{library}, {rate:,.0f} GB/s, {tuple(best)}")
    tell(f"written: {write_tuned(rows)}")


def _times(trial: Trial) -> dict[Config, float]:
    sets = input_sets(trial.make, trial.size_bytes)
    wanted = trial.wanted(*sets[0])
    size = wanted.norm()
    times: dict[Config, float] = {}
    for config in _compiled(trial, sets[0]):
        try:
            given = trial.run(config, *sets[0]).double()
            given = given.sum(0) if given.dim() > wanted.dim() else given
            if not float((given - wanted).norm() / size) < _TOLERANCE:  # NaN is wrong, too
                continue
            times[config] = microseconds(calls_over(partial(trial.run, config), sets), _ROUNDS)
        except (RuntimeError, TritonError):  # too much shared memory, too many registers
            torch.cuda.synchronize()
    return times


def _compiled(trial: Trial, inputs: tuple[Any, ...]) -> list[Config]:
    """The configurations that compile, compiled on many threads. A kernel that faults ends the process: no remedy."""

    def attempt(config: Config) -> Config | None:
        try:
            trial.run(config, *inputs)
        except (RuntimeError, TritonError):
            return None
        return config

    with ThreadPoolExecutor(8) as pool:
        return [config for config in pool.map(attempt, trial.configs) if config is not None]
