"""The documentation's examples that need a cluster, against a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fences import URL, Example, of_kind
from serving import Cluster

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("example", of_kind("python cluster", "bash cluster"), ids=str)
def test_an_example_runs_against_a_cluster(cluster: Cluster, example: Example, tmp_path: Path) -> None:
    code = example.code.replace(URL, cluster.url)
    command = (
        [sys.executable, "-c", code] if example.kind.startswith("python") else ["bash", "-euo", "pipefail", "-c", code]
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=os.environ | {"PATH": path}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example that shows nothing"
