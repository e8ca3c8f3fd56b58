"""Log records as lines: one line per event, whatever clients wrote into it. Called where a process begins.

In engines, managers and routers a line is JSON, for programs that collect them; on the terminal words.
Who writes what, and that no prompt, key or address of ours is in it, is for those who log.
"""

from __future__ import annotations

import json
import logging
import re
import time

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message"} and where an exception is told "trace", all in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told)


class TextLines(logging.Formatter):
    """`logger: message`, with control characters as they are written in programs."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        text = f"{record.name}: {record.getMessage()}"
        if record.exc_info:
            text += " | " + self.formatException(record.exc_info)
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def log_as_json() -> None:
    """All of this process from INFO on, to its error output; nothing where somebody has set up its logs."""
    _begin(JsonLines(), logging.getLogger(), logging.INFO)


def log_ours_as_json() -> None:
    """What this project logs from INFO on; for a process whose other logs are somebody else's."""
    logger = logging.getLogger("diptych")
    logger.setLevel(logging.INFO)
    _begin(JsonLines(), logger, logging.INFO)


def log_as_text() -> None:
    """All of this process from WARNING on, for a person at the terminal."""
    _begin(TextLines(), logging.getLogger(), logging.WARNING)


def _begin(formatter: logging.Formatter, logger: logging.Logger, level: int) -> None:
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.setLevel(level)
