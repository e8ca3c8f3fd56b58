"""The scripts of examples/llm as people run them: a process each, against a cluster that serves SmolLM2.

Guards against an example that works with its own script alone. One whose claims no small model keeps says
NEEDS_SCRIPT = True; tests/examples runs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
AT_ONCE = 4  # the model writes for several in the time that it takes for one
GOES = 10  # a model of 135 million parameters runs on past its limit of tokens in a third of the goes of some examples

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Done = subprocess.CompletedProcess[str]


def run(script: Path, cluster: Cluster, folder: Path) -> Done:
    for _ in range(GOES):
        done = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=folder,
            env={**os.environ, "DIPTYCH_URL": cluster.url, "DIPTYCH_MODEL": MODEL},
            check=False,
        )
        if not re.search(r"errors\.(Truncated|InvalidOutput|EmptyAnswer)", done.stderr):
            break
    return done


@pytest.fixture(scope="module")
def outcome(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Path], Done]]:
    """Waits for a script. Those that are to be tested run side by side from the first one on."""
    asked = [item.callspec.params["script"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs: dict[Path, Future[Done]] = {
            script: pool.submit(run, script, cluster, tmp_path_factory.mktemp(script.stem)) for script in asked
        }
        yield lambda script: runs[script].result()
        for left in runs.values():
            left.cancel()


@pytest.mark.parametrize("script", SERVED, ids=lambda script: str(script.relative_to(EXAMPLES)))
def test_an_example_runs_against_a_cluster(script: Path, outcome: Callable[[Path], Done]) -> None:
    done = outcome(script)
    if "ModuleNotFoundError: No module named" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example that shows nothing"
