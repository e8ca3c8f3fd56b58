"""examples/fallback.py runs, and both of its answers go on where they broke off.

Guards against an example that shows the failure instead of the fallback.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fallback.py"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_both_answers_go_on_elsewhere() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.split("2. the pool's")
    assert "[outside/talker] The capital of France is\n  [goes on at pool/smollm2-135m-instruct after server]" in first
    assert "attempts: outside/talker failed, pool/smollm2-135m-instruct answered" in first
    assert "[goes on at outside/talker after timeout_idle]  ... and here the provider goes on, behind" in second
    assert "attempts: pool/smollm2-135m-instruct failed, outside/talker answered" in second
    assert "error" not in done.stdout
