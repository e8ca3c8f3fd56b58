"""What an exception within one request's work becomes: the end of that request, and of nothing else.

Called by workers and sessions of an engine wherever they work for one request. What a library's native side panics with
is no Exception and is caught as well; only what ends the process, or says that the device is gone, goes through.
"""

from __future__ import annotations

import logging

from .errors import DiptychError, EngineFault, EngineLost
from .types import TransferKey

log = logging.getLogger(__name__)

PASSES = (KeyboardInterrupt, SystemExit, GeneratorExit, EngineLost)


def fault_of(exc: BaseException, key: TransferKey, stage: str) -> DiptychError:
    """How the request `key` ends because its `stage` raised `exc`: with it where it is ours, else with an EngineFault.

    Raises `exc` again where it is nobody's request's.
    """
    if isinstance(exc, PASSES):
        raise exc
    if isinstance(exc, DiptychError):
        return exc
    log.error("%s: its %s raised", key, stage, exc_info=exc)
    fault = EngineFault("the engine failed while computing this request", f"{stage}: {type(exc).__name__}: {exc}")
    fault.__cause__ = exc
    return fault
