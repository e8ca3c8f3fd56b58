"""Engines on a card: whole answers in both layouts, no memory taken after they are ready, a clear refusal before."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diptych.cluster.bench.shapes import shape_of
from diptych.cluster.config import ModelSettings
from diptych.cluster.engine.offline import OfflineEngines
from diptych.cluster.engine.spec import EngineSpec
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.protos.errors import StartupError
from diptych.protos.settings import DecodeSettings, KvSettings, PrefillSettings, TransferSettings
from diptych.protos.types import EngineId, Role

pytestmark = pytest.mark.gpu
LAYOUTS = {"colocated": (Role.DECODE,), "disaggregated": (Role.PREFILL, Role.DECODE)}


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as name:
        yield Path(name)


def make_specs(run_dir: Path, folder: Path, layout: str, memory_mib: int) -> list[EngineSpec]:
    config = make_tiny_checkpoint(folder / "whole", vocab_size=1000) / "config.json"
    (folder / "config.json").write_bytes(config.read_bytes())
    model = shape_of(folder, "tiny")
    settings = ModelSettings(
        source="tiny",
        weights="random",
        kv=KvSettings(memory_mib=memory_mib, block_tokens=16),
        prefill=PrefillSettings(step_tokens=128, threads=1),
        decode=DecodeSettings(step_tokens=128, threads=1, max_running=20),
    )
    return [
        EngineSpec(
            engine_id=EngineId(f"{role}-0"),
            epoch=1,
            roles=frozenset({role}),
            model="tiny",
            settings=settings,
            transfer=TransferSettings(),
            folder=model.path,
            facts=model.facts,
            dtype="bfloat16",
            run_dir=run_dir,
        )
        for role in LAYOUTS[layout]
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_whole_and_no_step_takes_memory(run_dir: Path, tmp_path: Path, layout: str) -> None:
    engines = OfflineEngines(make_specs(run_dir, tmp_path, layout, 64))
    infos = engines.start()
    try:
        assert all(not line.startswith("steps run without") for info in infos for line in info.degraded)
        before = torch.cuda.memory_reserved()
        for salt in (b"a", b"b"):
            answers = engines.generate([[3 + at, *range(at * 7)] for at in range(40)], 30, salt=salt)
            assert [answer.num_tokens for answer in answers] == [30] * 40
        assert torch.cuda.memory_reserved() == before
    finally:
        engines.stop()


def test_kv_that_does_not_fit_is_refused_before_anything_is_allocated(run_dir: Path, tmp_path: Path) -> None:
    engines = OfflineEngines(make_specs(run_dir, tmp_path, "colocated", 1 << 21))
    before = torch.cuda.memory_allocated()
    with pytest.raises(StartupError, match=r"GiB are missing.*would fit"):
        engines.start()
    assert torch.cuda.memory_allocated() == before
    engines.stop()
