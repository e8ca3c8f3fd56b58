"""`make conformance`: run the whole matrix and write docs/conformance.md. Exit code 1 and no file on a wrong token.

As a page it is read back by test_conformance_page.py, which compares its rows and columns with the code.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from matrix import Outcome, run
from situations import CONTEXT, QUICK, SERVED, SITUATIONS, WAYS
from subjects import subject_of

from diptych.kernels.testing import ARCHITECTURES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
Cells = Mapping[tuple[str, str], Outcome]  # by (situation, architecture)

TEXT = """# Conformance

Every family of models, in every situation, gives the tokens of transformers' own greedy `generate` (eager
attention, float32) on the same checkpoint. Made by `make conformance`; the same cells run in `make test-slow`,
{quick} of each family in `make test`. Do not edit.

**What a cell is.** Schedulers, workers, block pools, runner, arenas and the transfer are the real ones, with tiny
random models of each family (a few layers; windows shorter than most prompts, caps, sinks and experts switched on).
Only sockets and processes are left out: everything runs in one thread, where a seed draws the order of events. The
context is {context} tokens, and prompts have 1, block - 1, block, block + 1, ..., context - 1 tokens for the block
sizes of both engines. A number counts the tokens compared in that cell.

**Ties.** Answers are equal, or at the first difference the reference's two best logits lie within 1e-4. Such a cell
says how many.

**What is checked besides.** The situation really arose: sequences were preempted, prefixes were found, rows had the
length of the chunk. At every commit the decode engine's KV of the prompt equals the prefill engine's, and no
position is zero in any layer; before every step the same is asserted of all KV that the step reads, on both
engines. In the `layers` situations, zeroing K or V of any one layer changes the next logits. After every step the
books of both pools balance; at the end nothing is held.

**Through processes.** `tests/e2e/` compares real clusters with the same reference: the default model over every
transport, and {ray} in both layouts through `diptych serve` and HTTP.

{total_tokens} tokens in {cells} cells, {ties} ties. {date}: torch {torch}, transformers {transformers}, Python
{python}, {machine}; {seconds:.0f} s.

"""


def measure() -> dict[tuple[str, str], Outcome]:
    """The whole matrix, family by family."""
    cells = {}
    for architecture in ARCHITECTURES:
        began = time.monotonic()
        subject = subject_of(architecture)
        for situation in SITUATIONS:
            try:
                cells[situation.name, architecture] = run(subject.model, subject.reference, situation)
            except AssertionError as exc:
                raise SystemExit(f"{architecture}, {situation.name}: {exc}") from exc
        print(f"{architecture}: {len(SITUATIONS)} situations, {time.monotonic() - began:.1f} s", flush=True)
        for tie in subject.reference.ties:
            print(f"  tie: {tie}")
    return cells


def render(cells: Cells, seconds: float) -> str:
    """The page."""
    import torch
    import transformers

    head = TEXT.format(
        context=CONTEXT,
        quick=len(QUICK),
        ray=", ".join(SERVED),
        total_tokens=f"{sum(cell.tokens for cell in cells.values()):,}",
        cells=len(cells),
        ties=sum(cell.ties for cell in cells.values()),
        date=datetime.now(UTC).date(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        seconds=seconds,
    )
    lines = ["| situation | " + " | ".join(ARCHITECTURES) + " |", "|---|" + "--:|" * len(ARCHITECTURES)]
    for situation in SITUATIONS:
        row = (cells[situation.name, architecture] for architecture in ARCHITECTURES)
        lines.append(f"| {situation.name} | " + " | ".join(map(_cell, row)) + " |")
    lines += [
        "",
        "A situation is named by layout, way, tokens per step (512 unless told) and tokens per block of prefill and",
        "decode engine (16 and 16 unless told). The ways:",
        "",
    ]
    lines += [f"- `{way}`: {words}." for way, words in WAYS.items()]
    return head + "\n".join(lines) + "\n"


def _cell(outcome: Outcome) -> str:
    return (
        str(outcome.tokens) if not outcome.ties else f"{outcome.tokens} ({outcome.ties} tie{'s' * (outcome.ties > 1)})"
    )


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    measured = measure()
    PAGE.write_text(render(measured, time.monotonic() - started))
    print(f"written: {PAGE}")
