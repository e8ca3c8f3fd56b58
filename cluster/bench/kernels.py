"""`diptych bench kernels`: every op of the kernels' floor on this machine's card, beside what the card can do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .figures import regime, system, write_result


def run_kernels(ops: Sequence[str], *, is_tuned: bool, json_out: Path | None) -> None:
    """Measure and print: a line for each case, at the end one of JSON. Raises DiptychError."""
    from diptych.cluster.engine.op_times import card, time_ops  # torch

    tell = partial(print, flush=True)
    tell(regime())
    tell("graphs of at least 20 calls, inputs outgrow the card's cache, the median of 7 replays")
    result = time_ops(ops, tell, is_tuned=is_tuned)
    write_result({"system": system(), **card(), **result}, json_out)
