"""The scripts of examples/llm as people run them: a process each, against a cluster that serves SmolLM2.

Guards against an example that works with its own script alone. One whose claims no small model keeps says
NEEDS_SCRIPT = True; tests/examples runs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Cluster

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "llm"
SERVED = sorted(
    script
    for script in EXAMPLES.rglob("*.py")
    if not re.search(r"^NEEDS_SCRIPT\b[^=\n]*= True\b", script.read_text(), re.MULTILINE)
)
MODEL = "pool/smollm2-135m-instruct"
GOES = 10  # a model of 135 million parameters runs on past its limit of tokens in a third of the goes of some examples

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("script", SERVED, ids=lambda script: str(script.relative_to(EXAMPLES)))
def test_an_example_runs_against_a_cluster(script: Path, cluster: Cluster, tmp_path: Path) -> None:
    environ = {**os.environ, "DIPTYCH_URL": cluster.url, "DIPTYCH_MODEL": MODEL}
    for _ in range(GOES):
        done = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path,
            env=environ,
            check=False,
        )
        if not re.search(r"errors\.(Truncated|InvalidOutput|EmptyAnswer)", done.stderr):
            break
    if "ModuleNotFoundError: No module named" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example that shows nothing"
