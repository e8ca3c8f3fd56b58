"""What a gateway tells of a stream besides the answer: that it begins again, or goes on, at another target."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.protos.failures import FailureKind
from diptych.protos.replies import Event


@dataclass(frozen=True, slots=True)
class Restarted:
    """What came before is void; the answer begins anew at `target`. Only for who asked for restarts."""

    target: str
    after: FailureKind


@dataclass(frozen=True, slots=True)
class Continued:
    """What follows is written by `target`, which was given the text so far: two models are never joined silently."""

    target: str
    after: FailureKind


Signal = Restarted | Continued
StreamItem = Event | Signal
