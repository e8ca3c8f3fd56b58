"""The matrix as a table for a terminal and as a dated page; the numbers as they were measured, the misses by name."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

from cells import NOT_COVERED
from tally import MAX_DETECTION_S, MAX_FAILED, MAX_SILENCE_S, Matrix, Tally, p99

HEAD = (
    "step",
    "covers",
    "phase",
    "requests",
    "failed",
    "wrong",
    "doubled",
    "missing",
    "leaked",
    "deaths",
    "moves",
    "detection p99 s",
    "recovery p99 s",
)


def cells_of(line: Tally) -> tuple[str, ...]:
    """The columns of HEAD. Recovery: from a death to the next token of any stream that was in work."""
    return (
        line.name,
        ", ".join(line.covers),
        line.phase,
        str(line.requests),
        f"{sum(line.failed.values())}{' (expected)' if line.may_break and line.failed else ''}",
        str(line.verdict.wrong),
        str(line.verdict.doubled),
        str(line.verdict.missing),
        str(len(line.leaked)),
        str(line.deaths),
        str(line.moves),
        _seconds(p99(line.detection)),
        _seconds(p99(line.silence)),
    )


def terminal(line: Tally) -> str:
    """One line, and below it what is to be said of it."""
    told = cells_of(line)
    text = f"{told[0]:<24} " + " ".join(f"{name} {value}" for name, value in zip(HEAD[3:], told[3:], strict=True))
    return "\n".join([text, *(f"    {remark}" for remark in remarks(line))])


def remarks(line: Tally) -> list[str]:
    """What does not fit into columns; the worst first."""
    found = [f"LEAKED {leak}" for leak in line.leaked] + [f"WRONG {example}" for example in line.examples]
    found += [f"MISSED {miss}" for miss in line.missed()]
    if line.failed:
        found.append("failed: " + ", ".join(f"{code} {number}" for code, number in sorted(line.failed.items())))
    if line.counters:
        found.append(", ".join(f"{name} {number:g}" for name, number in sorted(line.counters.items())))
    return found + line.notes


def page(matrix: Matrix, *, title: str, seed: int, run: str, took_s: float) -> str:
    """Markdown. `run`: what was run, in a sentence."""
    verdict = matrix.verdict
    lines = [
        f"# {title}",
        "",
        f"{today()}, commit {commit()}, seed {seed}, {took_s / 60:.1f} minutes. {machine()}.",
        run,
        "",
        f"**{matrix.requests} requests: {verdict.wrong} wrong tokens, {verdict.doubled} doubled, "
        f"{verdict.missing} missing, {matrix.num_leaked} leaks, {matrix.num_failed} failed ({_percent(matrix)}).**",
        "",
        "Every answer is compared token for token with the one of an undisturbed cluster. A request is *failed* when",
        "it was refused or ended in an error; its tokens until then are compared too. *Recovery* is the longest wait",
        "of any stream in work, from a death to its next token. After each step nothing may be held: no block,",
        "transfer, staging slot, request. Promised: nothing wrong, doubled or leaked; at most "
        f"{100 * MAX_FAILED:g} % failed; detection p99 {MAX_DETECTION_S:g} s; recovery p99 {MAX_SILENCE_S:g} s.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells_of(line)) + " |" for line in matrix.lines),
        "",
        "## Faults",
        "",
        *(f"- `{line.name}`: {line.what}" for line in matrix.lines),
        "",
        "## Missed, and other remarks",
        "",
        *([f"- `{line.name}`: {remark}" for line in matrix.lines for remark in remarks(line)] or ["None."]),
        "",
        "## Not covered",
        "",
        *(f"- {what}: {why}" for what, why in NOT_COVERED.items()),
    ]
    return "\n".join(lines) + "\n"


def today() -> str:
    """ISO, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine() -> str:
    """The one that this runs on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """Of the sources, marked where they were changed since."""
    here = Path(__file__).parent
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def _percent(matrix: Matrix) -> str:
    return f"{100 * matrix.num_failed / matrix.requests:.3f} %" if matrix.requests else "-"


def _seconds(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"
