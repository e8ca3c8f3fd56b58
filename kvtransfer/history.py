"""What a machine remembers of transfers that have ended, within bounds: the fence against late messages."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from diptych.protos.errors import DiptychError, error_from_code
from diptych.protos.types import TransferKey

_KEPT = 8192  # ended transfers; a late message older than so many transfers meets an unknown key instead


@dataclass(frozen=True, slots=True)
class Ended:
    """How a transfer ended. `final_token` is token 0 when it ended the request at the prefill engine."""

    error: DiptychError | None = None
    final_token: int | None = None
    num_tokens: int = 0


class History:
    """Ended transfers by key, and the newest attempt of every transfer id seen."""

    def __init__(self) -> None:
        self._ended: OrderedDict[TransferKey, Ended] = OrderedDict()
        self._newest: OrderedDict[bytes, int] = OrderedDict()

    def is_stale(self, key: TransferKey) -> bool:
        """Whether a newer attempt of the same transfer is known. Takes note of the attempt."""
        newest = self._newest.get(key.transfer_id, -1)
        if key.attempt > newest:
            self._newest[key.transfer_id] = newest = key.attempt
        self._newest.move_to_end(key.transfer_id)
        while len(self._newest) > _KEPT:
            self._newest.popitem(last=False)
        return key.attempt < newest

    def end(self, key: TransferKey, ended: Ended) -> None:
        """Remember how a transfer ended; the first word stands."""
        if ended.error is not None:  # its words only: the frames of a traceback may hold a step's tensors
            ended = replace(ended, error=error_from_code(ended.error.code, str(ended.error)))
        self._ended.setdefault(key, ended)
        while len(self._ended) > _KEPT:
            self._ended.popitem(last=False)

    def find(self, key: TransferKey) -> Ended | None:
        """How it ended, or None when it did not or was forgotten."""
        return self._ended.get(key)
