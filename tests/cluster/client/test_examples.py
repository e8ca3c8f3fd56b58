"""The scripts in examples/ that use the client, against a front door of echo engines: every line of them runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.cluster.api.testing import front_door

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.parametrize(("name", "words"), [("python_client.py", "refused: temperature"), ("sampling.py", "scores")])
async def test_an_example_runs(name: str, words: str) -> None:
    async with front_door() as door:
        command = [sys.executable, str(EXAMPLES / name), door.listener.url]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=120, cwd="/", check=False
        )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
