"""The verb `diptych keygen`: a fresh API key. The key itself is shown once; the file gets its hash."""

from __future__ import annotations

import sys
from pathlib import Path

from diptych.protos.errors import StartupError

from .config import LABEL_RULE, is_label
from .keys import Caller, add_key, key_line, make_key


def run_keygen(tenant: str, *, is_admin: bool, file: Path | None) -> int:
    """Print the key, and its line unless it was written to `file`; the exit code."""
    if not is_label(tenant):
        print(f"diptych: the tenant {tenant!r} {LABEL_RULE}", file=sys.stderr)
        return 1
    key = make_key()
    line = key_line(key, Caller(tenant, is_admin))
    try:
        if file is not None:
            add_key(file, line)
    except StartupError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    print(key)
    if file is None:
        print(line)
    return 0
