"""A log record is one line, whatever a client wrote into it: no line of its own, no colour, no field (exam row S29)."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.observability.logs import JsonLines, TextLines


def record(message: str, *, fails: bool = False) -> logging.LogRecord:
    info = None
    if fails:
        try:
            raise RuntimeError(message)
        except RuntimeError:
            info = sys.exc_info()
    return logging.LogRecord("diptych.test", logging.WARNING, __file__, 1, "it said %s", (message,), info)


@given(st.text(), st.booleans())
def test_any_message_is_one_line_of_json_that_says_it(message: str, fails: bool) -> None:
    line = JsonLines().format(record(message, fails=fails))
    assert line.isascii()
    assert line.isprintable()
    told = json.loads(line)
    assert told["message"] == f"it said {message}"
    assert ("trace" in told) == fails
    assert set(told) <= {"time", "level", "logger", "message", "trace"}


@given(st.text(), st.booleans())
def test_any_message_is_one_line_on_the_terminal(message: str, fails: bool) -> None:
    line = TextLines().format(record(message, fails=fails))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_a_process_writes_lines_of_json_to_its_error_output() -> None:
    program = (
        "import logging; from diptych.cluster.observability.logs import log_as_json; log_as_json();"
        "logging.getLogger('diptych.a').info('x\\r\\n\\x1b[31m{\\\"level\\\":\\\"INFO\\\"}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["message"] == 'x\r\n\x1b[31m{"level":"INFO"}'
