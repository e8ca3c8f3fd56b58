"""What a machine remembers of transfers that have ended, for some time: the fence against late messages."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TypeVar

from diptych.protos.errors import DiptychError, error_from_code
from diptych.protos.types import TransferKey

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_MOST = 262_144  # of each kind, should a peer go mad: more than a busy engine ends in `keep_s`


@dataclass(frozen=True, slots=True)
class Ended:
    """How a transfer ended. `final_token` is token 0 when it ended the request at the prefill engine."""

    error: DiptychError | None = None
    final_token: int | None = None
    num_tokens: int = 0


class History:
    """Ended transfers by key, and the newest attempt of every transfer id noted, each for `keep_s` seconds.

    A message that is later than that meets an unknown key instead.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._ended: OrderedDict[TransferKey, tuple[float, Ended]] = OrderedDict()  # oldest first, as below
        self._newest: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def is_stale(self, key: TransferKey) -> bool:
        """Whether a newer attempt of the same transfer was noted. Changes nothing."""
        noted = self._newest.get(key.transfer_id)
        return noted is not None and key.attempt < noted[1]

    def note(self, key: TransferKey, now: float) -> None:
        """This attempt has begun: older ones are stale from now on."""
        _, newest = self._newest.pop(key.transfer_id, (now, key.attempt))
        self._newest[key.transfer_id] = (now, max(newest, key.attempt))
        self._forget(self._newest, now)

    def end(self, key: TransferKey, ended: Ended, now: float) -> None:
        """Remember how a transfer ended; the first word stands."""
        if ended.error is not None:  # its words only: the frames of a traceback may hold a step's tensors
            ended = replace(ended, error=error_from_code(ended.error.code, str(ended.error)))
        self._ended.setdefault(key, (now, ended))
        self._forget(self._ended, now)

    def find(self, key: TransferKey) -> Ended | None:
        """How it ended, or None when it did not or was forgotten."""
        found = self._ended.get(key)
        return found[1] if found is not None else None

    def _forget(self, kept: OrderedDict[_Key, tuple[float, _Value]], now: float) -> None:
        while kept and (len(kept) > _MOST or now - next(iter(kept.values()))[0] > self._keep_s):
            kept.popitem(last=False)
