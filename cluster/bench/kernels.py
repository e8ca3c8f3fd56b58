"""`diptych bench kernels`: every op of the kernels' floor on this machine's card, beside what the card can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .figures import regime, save_result, system, write_result
from .provenance import CardWatch, provenance


def run_kernels(ops: Sequence[str], *, is_tuned: bool, json_out: Path | None) -> None:
    """Measure and print: a line for each case, at the end one of JSON; the file is there after each op already. Raises
    DiptychError.
    """
    from diptych.cluster.engine.op_times import card, time_ops  # torch

    tell = partial(print, flush=True)
    tell(regime())
    tell("graphs of at least 20 calls (fewer of long ones), inputs outgrow the card's cache, the median of 7 replays;")
    tell("behind a line: the same work by others, and how many times as fast as the best of them")
    about: dict[str, Any] = {"system": system(), **provenance()}

    def keep(result: dict[str, Any]) -> None:
        save_result(about | card() | result, json_out)

    with CardWatch() as watch:
        began = time.monotonic()
        result = time_ops(ops, tell, keep, is_tuned=is_tuned)
        about["card_state"] = watch.between(began, time.monotonic())
    write_result(about | card() | result, json_out)
