"""When a second attempt may run beside a slow one, and how many of them there may be. exchange.py runs the race."""

from __future__ import annotations

from diptych.protos.openai import ChatRequest

from .load import Load
from .settings import HedgeSettings

_PARTS = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
MAX_SAVED = 10.0  # hedges that quiet times may save for a slow moment


class HedgeBudget:
    """Of one route: each request brings `max_fraction` of a hedge, so that there are never more."""

    def __init__(self, settings: HedgeSettings) -> None:
        self._settings = settings
        self._saved = 0.0

    def admitted(self) -> None:
        """A request of the route came, whether it may be hedged or not."""
        self._saved = min(self._saved + self._settings.max_fraction, MAX_SAVED)

    @property
    def is_left(self) -> bool:
        """Whether there may be one now."""
        return self._saved >= 1.0 - 1e-9

    def take(self) -> None:
        """One begins."""
        self._saved = max(self._saved - 1.0, 0.0)

    def delay_s(self, load: Load, *, is_stream: bool) -> float | None:
        """How long the first attempt may take; None while too little is known of its target."""
        after = self._settings.after
        if not isinstance(after, str):
            return after
        return (load.first_content if is_stream else load.answer).at(_PARTS[after])


def may_be_hedged(request: ChatRequest) -> bool:
    """Whether two targets may work on it at once: calls of tools and what providers keep would happen twice."""
    return request.tool_use is None and not request.provider_options
