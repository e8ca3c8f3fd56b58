"""What ran in a few steps, by kernel: how often, how long, which part of the time; and how long nothing ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LINES = 24
_NAME_WIDTH = 72

Piece = tuple[str, float, float, float]  # name; begin and end in us; us of its own, without what it called


def summary(pieces: Sequence[Piece], steps: int) -> dict[str, Any]:
    """`step_us`: of the time from the first piece to the last; `idle_share`: of it, how much had no piece at all.

    `kernels`, the longest first: name, count, us and share of a step. Shares add up to more than the busy part where
    pieces overlap.
    """
    if not pieces or steps < 1:
        return {"steps": 0, "step_us": None, "idle_share": None, "kernels": []}
    spans = sorted((begin, end) for _, begin, end, _ in pieces)
    window = max(end for _, end in spans) - spans[0][0]
    busy, upto = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(end - max(begin, upto), 0.0)
        upto = max(upto, end)
    sums: dict[str, tuple[int, float]] = {}
    for name, _, _, own in pieces:
        count, total = sums.get(name, (0, 0.0))
        sums[name] = count + 1, total + own
    kernels = [
        {
            "name": name,
            "count": round(count / steps, 2),
            "us": round(total / steps, 2),
            "share": round(total / window, 4) if window else None,
        }
        for name, (count, total) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]
    return {
        "steps": steps,
        "step_us": round(window / steps, 1),
        "idle_share": round(1 - busy / window, 4) if window else None,
        "kernels": kernels,
    }


def profile_lines(workload: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The table; the longest kernels only."""
    if not found["steps"]:
        yield f"profile of {workload}: no step was traced"
        return
    yield (
        f"profile of {workload}: {found['steps']} steps from number {found['first_step']} on, "
        f"{found['step_us']:,} us each, idle {found['idle_share']:.1%}"
    )
    yield f"  {'kernel':<{_NAME_WIDTH}}{'a step':>9}{'us':>12}{'share':>9}"
    kernels = found["kernels"]
    for kernel in kernels[:_LINES]:
        name = kernel["name"][: _NAME_WIDTH - 2]
        yield f"  {name:<{_NAME_WIDTH}}{kernel['count']:>9,}{kernel['us']:>12,.1f}{kernel['share']:>9.1%}"
    if len(kernels) > _LINES:
        rest = kernels[_LINES:]
        us, share = sum(k["us"] for k in rest), sum(k["share"] for k in rest)
        yield f"  {f'{len(rest)} others':<{_NAME_WIDTH}}{'':>9}{us:>12,.1f}{share:>9.1%}"
