"""What a manager keeps of its pools for the next one: who owns them, the plan as it was applied, and the pools as they
stand, with the sizes that were set since.
"""

from __future__ import annotations

import functools

from pydantic import TypeAdapter

from .manager import KeyValue
from .plan import ClusterPlan, Pool

_KEY = "plan"

Kept = tuple[str, ClusterPlan | None, tuple[Pool, ...]]


@functools.cache
def kept_form() -> TypeAdapter[Kept]:
    """JSON, so that what lies in the store is data whoever wrote it."""
    return TypeAdapter(Kept)


def read_kept(store: KeyValue) -> Kept:
    """Nobody, no plan and no pools where nothing was kept."""
    stored = store.get(_KEY)
    return kept_form().validate_json(stored) if stored else ("", None, ())


def keep(store: KeyValue, kept: Kept) -> None:
    """Durable when it returns."""
    store.put(_KEY, kept_form().dump_json(kept))
