"""Engines on a card: whole answers in both layouts, no memory taken after they are ready, a clear refusal before."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.cluster.bench.shapes import shape_of
from diptych.cluster.config import ModelSettings
from diptych.cluster.control import cards
from diptych.cluster.engine.card import Card
from diptych.cluster.engine.card_plan import plan_card
from diptych.cluster.engine.offline import OfflineEngines
from diptych.cluster.engine.spec import EngineSpec
from diptych.kernels.device.memory_plan import GIB
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.protos.errors import StartupError
from diptych.protos.settings import DecodePoolSettings, KvSettings, PrefillPoolSettings, TransferSettings
from diptych.protos.types import EngineId, Role

pytestmark = pytest.mark.gpu
LAYOUTS = {"colocated": (Role.DECODE,), "disaggregated": (Role.PREFILL, Role.DECODE)}


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as name:
        yield Path(name)


def make_specs(run_dir: Path, folder: Path, layout: str, memory_mib: int | None, **more: Any) -> list[EngineSpec]:
    config = make_tiny_checkpoint(folder / "whole", vocab_size=1000) / "config.json"
    (folder / "config.json").write_bytes(config.read_bytes())
    model = shape_of(folder, "tiny")
    settings = {
        "source": "tiny",
        "weights": "random",
        "layout": layout,
        "device": "cuda",
        "kv": KvSettings(memory_mib=memory_mib, block_tokens=16),
        "decode": DecodePoolSettings(step_tokens=128, threads=1, max_running=20),
        **({"prefill": PrefillPoolSettings(step_tokens=128, threads=1)} if layout == "disaggregated" else {}),
    }
    return [
        EngineSpec(
            engine_id=EngineId(f"{role}-0"),
            epoch=1,
            roles=frozenset({role}),
            model="tiny",
            settings=ModelSettings(**(settings | more)),
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
        before = None
        for salt in (b"a", b"b", b"c"):
            answers = engines.generate([[3 + at, *range(at * 7)] for at in range(40)], 30, salt=salt)
            assert [answer.num_tokens for answer in answers] == [30] * 40
            before = before or torch.cuda.memory_reserved()  # the first transfer takes buffers of a few MiB
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kv_without_a_size_takes_its_share_and_leaves_the_reserve(run_dir: Path, tmp_path: Path, layout: str) -> None:
    share = 0.1 / len(LAYOUTS[layout])  # of the card; both engines of a layout are in this process
    engines = OfflineEngines(make_specs(run_dir, tmp_path, layout, None, gpu_share=share))
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests have left could be taken without reserving more
    before, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    infos = engines.start()
    try:
        taken = torch.cuda.memory_reserved() - before  # others may use the card meanwhile
        assert 0.5 * share * total * len(infos) < taken < share * total * len(infos)
        answers = engines.generate([[3 + at, *range(at * 7)] for at in range(40)], 30, salt=b"a")
        assert [answer.num_tokens for answer in answers] == [30] * 40
    finally:
        engines.stop()


def test_the_plan_before_loading_is_near_what_the_largest_step_takes(run_dir: Path, tmp_path: Path) -> None:
    [spec] = make_specs(run_dir, tmp_path, "colocated", 64)
    card = Card(spec)
    card.load(0)
    card.num_blocks()
    planned = plan_card(spec, 0).used
    assert card._plan.used <= planned + GIB, "what was rehearsed is no more than what was planned, but for code"


def test_the_driver_tells_the_card_that_torch_sees() -> None:
    found = cards.installed()
    assert found.driver
    name, total = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    assert any(card.name == name and abs(card.total - total) < 0.05 * total for card in found.cards)
    assert cards.find().count == torch.cuda.device_count()


def test_a_deterministic_engine_answers(run_dir: Path, tmp_path: Path) -> None:
    """That every bit is the same is proved where decoders are."""
    engines = OfflineEngines(make_specs(run_dir, tmp_path, "colocated", 64, deterministic=True))
    engines.start()
    try:
        answers = engines.generate([[3 + at, *range(at * 7)] for at in range(12)], 20, salt=b"a")
        assert [answer.num_tokens for answer in answers] == [20] * 12
    finally:
        engines.stop()
