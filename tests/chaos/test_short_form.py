"""The short form of `make chaos` on a real cluster: nothing wrong, doubled, missing or leaked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).resolve().parent


@pytest.mark.slow
def test_whatever_dies_the_clients_see_the_right_tokens() -> None:
    done = subprocess.run([sys.executable, str(CHAOS), "--short"], capture_output=True, text=True, timeout=800)
    print(done.stdout, done.stderr, sep="\n")
    # 2: a promise of time was missed, which a busy machine may do; see Matrix.exit_code.
    assert done.returncode in (0, 2), done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 wrong, 0 doubled, 0 missing, 0 leaked" in done.stdout.splitlines()[-1]
