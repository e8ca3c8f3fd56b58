"""One real cluster for the whole test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Cluster, alive, start_cluster, stop_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster with the default model in float32, so that tokens can be compared with the reference."""
    folder = tmp_path_factory.mktemp("cluster")
    settings = ("models.smollm2-135m-instruct.dtype=float32", f"telemetry.trace_file={folder / 'spans.jsonl'}")
    running = start_cluster(folder, *(option for setting in settings for option in ("--set", setting)))
    yield running
    code = stop_cluster(running)
    left = alive(running.tree)
    assert code == 0, running.printed()
    assert not left, f"processes left behind: {left}"
