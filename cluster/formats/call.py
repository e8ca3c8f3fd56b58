"""One call as it becomes known: its name, its arguments, whether it is certain. The reader of calls fills it.

Arguments may come before the name; they wait here then. It does not know how a call is written.
"""

from __future__ import annotations

from diptych.cluster.formats.output import ARGUMENTS, Output

NO_ARGUMENTS = "{}"


class Call:
    """A call that may be one. Without `needs_arguments` a name is enough to begin it."""

    __slots__ = ("_early", "_is_done", "_needs_arguments", "_out", "has_arguments", "has_begun", "has_ended", "name")

    def __init__(self, out: Output, *, needs_arguments: bool) -> None:
        self._out = out
        self._needs_arguments = needs_arguments
        self._early: list[str] = []
        self._is_done = False
        self.name: str | None = None
        self.has_arguments = False  # the first of them are known, or that there are none
        self.has_begun = False
        self.has_ended = False

    def begin_if_certain(self) -> bool:
        """Begins the call where it is certain now and was not before, and tells what waited."""
        if self.has_begun or self.name is None or (self._needs_arguments and not self.has_arguments):
            return False
        self.has_begun = True
        self._out.begin_call(self.name)
        for piece in self._early:
            self._out.say(ARGUMENTS, piece)
        self._early = []
        if self._is_done:
            self.end()
        return True

    def tell(self, piece: str) -> None:
        """The next piece of the arguments."""
        if self.has_begun:
            self._out.say(ARGUMENTS, piece)
        else:
            self._early.append(piece)

    def end_arguments(self) -> None:
        """No more of them come."""
        self._is_done = True
        self.end()

    def end(self) -> None:
        """Ends the call if it began; the first time counts."""
        if self.has_begun and not self.has_ended:
            self.has_ended = True
            self._out.end_call()
