"""Which routers read the membership, and how far each has read. Pure; `clock` gives seconds."""

from __future__ import annotations

from collections.abc import Callable


class Readers:
    """A reader that has not asked for `patience_s` is gone."""

    def __init__(self, clock: Callable[[], float], *, patience_s: float) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._seen: dict[str, tuple[int, float]] = {}  # the version it has taken in, and when it said so

    def note(self, reader: str, version: int) -> None:
        """It asks for what is newer than `version`, so it has taken in that much."""
        now = self._clock()
        self._seen = {name: seen for name, seen in self._seen.items() if seen[1] > now - self._patience_s}
        self._seen[reader] = (version, now)

    def is_behind(self, version: int) -> bool:
        """Whether a reader that still asks has yet to take in `version`."""
        oldest = self._clock() - self._patience_s
        return any(read < version for read, at in self._seen.values() if at > oldest)
