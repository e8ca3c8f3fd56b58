"""`make chaos`: breaks a running cluster in every way of the matrix and says what came of it.

python tests/chaos [--short] [--only STEP ...] [--report FILE]      exit code: see Matrix.exit_code
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exam"))

from cancels import run_cancels
from cells import CELLS, Cell
from chaos_report import page, terminal, today
from drive import Stage, run_cell, run_rounds
from load import Asks
from rig import RigError, start, stop
from soak import run_soak
from tally import Matrix, Tally

REPORTS = Path(__file__).resolve().parents[2] / "docs" / "reports"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    requests: int  # of a cell
    cancels: int
    soak_s: float
    every_s: float
    rate: float  # requests a second of echo; of a real model a tenth
    models: tuple[str, ...]  # of the soaks
    has_rounds: bool  # cells that want it are repeated


SHORT = Size(requests=20, cancels=500, soak_s=16, every_s=8, rate=10, models=("echo",), has_rounds=False)
LONG = Size(requests=60, cancels=10_500, soak_s=600, every_s=30, rate=10, models=("echo", "smollm2"), has_rounds=True)


@contextmanager
def staged(kind: str, seed: int) -> Iterator[Stage]:
    """A cluster of its own; what it leaves behind is an error."""
    rig = start(kind, folder=Path(tempfile.mkdtemp(prefix="chaos-")))
    try:
        if kind == "echo":
            asks = Asks(rig.expected, seed=seed)
        else:
            asks = Asks(rig.expected, seed=seed, prompt_tokens=(8, 48), max_tokens=(16, 48), different=24)
        yield Stage(rig, asks, before=rig.quiet(30))
    finally:
        left = stop(rig)
        print(f"log: {rig.log}", flush=True)
    if left:
        raise RigError(f"left behind: {left}")


def run(matrix: Matrix, chosen: Sequence[Cell], size: Size, *, soaks: bool, seed: int) -> None:
    """All steps, each added to the matrix when it is over."""

    def add(line: Tally) -> None:
        matrix.lines.append(line)
        print(terminal(line), flush=True)

    with staged("echo", seed) as stage:
        for at, cell in enumerate(chosen):
            if size.has_rounds and cell.rounds > 1:
                add(run_rounds(stage, cell, seed=seed + at))
            else:
                at_least = cell.at_least if size.has_rounds else 0
                add(run_cell(stage, cell, requests=size.requests, seed=seed + at, at_least=at_least))
        if soaks:
            add(run_cancels(stage, number=size.cancels, seed=seed))
            for role in ("decode", "prefill"):
                add(_soak(stage, role, size, seed, size.rate))
    for kind in size.models[1:] if soaks else ():
        with staged(kind, seed) as stage:
            for role in ("decode", "prefill"):
                add(_soak(stage, role, size, seed, size.rate / 10))


def _soak(stage: Stage, role: str, size: Size, seed: int, rate: float) -> Tally:
    return run_soak(stage, role=role, for_s=size.soak_s, every_s=size.every_s, rate=rate, seed=seed)


def report_of(asked: argparse.Namespace) -> Path | None:
    """Where the report goes, if there is to be one."""
    if asked.report is None and not asked.short and not asked.only:
        return REPORTS / f"chaos-{today()}.md"
    return Path(asked.report) if asked.report is not None else None


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a part of it, in five minutes")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these cells, without cancels and soaks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, help="of a cell")
    parser.add_argument("--cancels", type=int, help="clients that leave")
    parser.add_argument("--soak", type=float, help="seconds of each soak")
    parser.add_argument("--report", type=Path, help="by default docs/reports/chaos-DATE.md, of the long form alone")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped
    known = {cell.id: cell for cell in CELLS}
    if unknown := set(asked.only) - known.keys():
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if asked.only:
        chosen = [known[name] for name in asked.only]
    else:
        chosen = [cell for cell in CELLS if cell.short or not asked.short]
    size = SHORT if asked.short else LONG
    if asked.soak is not None:
        size = replace(size, soak_s=asked.soak)
    if asked.cancels is not None:
        size = replace(size, cancels=asked.cancels)
    if asked.requests is not None:
        size = replace(size, requests=asked.requests)
    matrix = Matrix()
    began = time.monotonic()
    is_whole = False
    try:
        run(matrix, chosen, size, soaks=not asked.only, seed=asked.seed)
        is_whole = True
    except RigError as exc:
        print(f"chaos: {exc}", file=sys.stderr)
    finally:
        took_s = time.monotonic() - began
        if (report := report_of(asked)) is not None and matrix.lines:
            form = "short form" if asked.short else "chosen steps" if asked.only else "long form"
            told = f"2 prefill and 2 decode engines, one router, `python tests/chaos`, {form}, "
            told += f"{size.requests} requests a cell." if asked.only else f"{size}."
            if not is_whole:
                told += " **The run was ended before its last step.**"
            report.write_text(page(matrix, title="Chaos", seed=asked.seed, run=told, took_s=took_s))
            print(f"report: {report}")
    verdict = matrix.verdict
    print(
        f"{matrix.requests} requests, {verdict.wrong} wrong, {verdict.doubled} doubled, {verdict.missing} missing, "
        f"{matrix.num_leaked} leaked, {matrix.num_failed} failed, {took_s:.0f} s"
    )
    return matrix.exit_code() if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
