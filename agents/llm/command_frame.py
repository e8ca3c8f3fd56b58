"""How commands on typed calls end: exit codes, a sentence on stderr, values as JSON on stdout.

command.py and batch_command.py run inside `ended`. It knows nothing of what they do.
"""

from __future__ import annotations

import codecs
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json

from diptych.protos.errors import DiptychError

from .command_arguments import WrongArguments
from .errors import UsageError

FAILED, WRONG, INTERRUPTED = 1, 2, 130


def ended(body: Callable[[], int], target: str = "", *, wrong: type[UsageError] = WrongArguments) -> int:
    """The exit code that `body` gives; 1 with a sentence on stderr where it failed; 2 for a mistake of the command
    line, as `wrong` tells it; 130 after Ctrl-C. Of what the code of the file in `target` raises, its own lines are
    shown.
    """
    for file in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(file, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")  # a terminal without a letter of the answer still shows the rest
    try:
        return body()
    except wrong as exc:
        return _said(str(exc), WRONG)
    except DiptychError as exc:
        return _said(str(exc), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # who read stdout has left: the command's frame ends quietly
        raise
    except Exception as exc:
        return _raised(exc, target)


def noted(words: str) -> None:
    """What is no part of the result."""
    print(f"diptych: {words}", file=sys.stderr, flush=True)


def json_of(value: Any, name: str, *, indent: int | None = None) -> bytes:
    """Raises UsageError that names what cannot be written."""
    try:
        told = to_json(value, indent=indent, by_alias=True, inf_nan_mode="strings", bytes_mode="base64")
    except (PydanticSerializationError, UnicodeError) as exc:
        raise UsageError(
            f"{name} gave what JSON cannot say, a value of the type {type(value).__name__} ({exc}): let it return "
            f"texts, numbers, lists, dicts, models or dataclasses"
        ) from exc
    if told.isascii() or codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name.startswith("utf"):
        return told
    return json.dumps(from_json(told), indent=indent).encode()  # what stdout cannot write, as JSON escapes it


def _said(words: str, code: int) -> int:
    noted(words)
    return code


def _raised(exc: Exception, target: str) -> int:
    """Of the file's own code: its developer wants to see where."""
    path = str(Path(target.rpartition(":")[0]).resolve())
    frames = traceback.extract_tb(exc.__traceback__)
    begin = next((at for at, one in enumerate(frames) if one.filename == path), 0)
    print("".join(traceback.format_list(frames[begin:])), end="", file=sys.stderr)
    told = "".join(traceback.format_exception_only(exc)).strip()
    return _said(f"{target} raised {told}", FAILED)
