"""Who gives way when blocks or seats are short. Chooses only; pure.

Urgency is (priority, arrival), lower being more urgent. Nobody gives way to somebody less urgent, so the most urgent of
all always goes on, and an engine that is short of blocks never stands still.
"""

from __future__ import annotations

from collections.abc import Iterable

from .residents import Residents
from .sequence import Sequence


def least_urgent(candidates: Iterable[Sequence]) -> Sequence | None:
    """The one to give way first, or None where there is nobody."""
    return max(candidates, key=lambda one: one.place.urgency, default=None)


def less_urgent(candidates: Iterable[Sequence], priority: int) -> list[Sequence]:
    """Those that may give way to a newcomer of `priority`, the first to do so first.

    Only a lower class gives way to a newcomer: within a class whoever has begun goes on.
    """
    found = [one for one in candidates if one.place.priority > priority]
    return sorted(found, key=lambda one: one.place.urgency, reverse=True)


def freed_blocks(residents: Residents, victims: Iterable[Sequence], keeper: Sequence) -> int:
    """How many blocks nobody uses any more once `victims` have given theirs up; `keeper` has some already."""
    leaving = {one.key: one for one in victims}
    staying = [one for one in (*residents.holders(), *residents.fetching.values()) if one.key not in leaving]
    kept = {block for one in (*staying, keeper) for block in one.blocks}
    return len({block for one in leaving.values() for block in one.blocks} - kept)
