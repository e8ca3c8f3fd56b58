"""An engine on a card that is not there: torch's questions about it are answered here, and the CPU computes. Whatever
a card's start does besides computing is the real thing: plans, rehearsal, arena, graphs' shapes, the cost of steps.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.cluster.bench.shapes import shape_of
from diptych.cluster.config import ModelSettings
from diptych.cluster.engine import card
from diptych.cluster.engine.card_plan import num_weights, plan_card
from diptych.cluster.engine.compose import EngineParts
from diptych.cluster.engine.engine import build
from diptych.cluster.engine.offline import OfflineEngines
from diptych.cluster.engine.spec import EngineSpec
from diptych.kernels.device.ahead import AheadOf, stand_in
from diptych.kernels.device.memory_plan import GIB, GRAPHS, RESERVE
from diptych.kernels.device.runner import DeviceRunner
from diptych.kernels.device.state import DeviceState
from diptych.kernels.model import LoadedModel, load_hand_written
from diptych.kernels.models.shape import read_shape
from diptych.kernels.ops.sampling.space import SampleSpace
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.protos.errors import StartupError
from diptych.protos.settings import DecodePoolSettings, KvSettings, PrefillPoolSettings, TransferSettings
from diptych.protos.types import EngineId, Role

LAYOUTS = {"colocated": (Role.DECODE,), "disaggregated": (Role.PREFILL, Role.DECODE)}
SMALL = {"step_tokens": 64, "threads": 1}


class FakeKernels:
    """Compiled ahead; `events` says what was asked."""

    def __init__(self, wanted: AheadOf) -> None:
        self.wanted = wanted
        self.shape = stand_in(read_shape(json.loads((wanted.folder / "config.json").read_text())))
        self.events: list[str] = []

    def begin(self) -> None:
        self.events.append("begin")

    def join(self) -> None:
        self.events.append("join")


class FakeCard:
    """What torch says of its memory, and which loads were asked for."""

    def __init__(self) -> None:
        self.free = self.total = 3 * GIB
        self.loads: list[dict[str, Any]] = []
        self.compiled: list[FakeKernels] = []

    def load(self, folder: Path, **asked: Any) -> LoadedModel:
        self.loads.append(asked)
        config = json.loads((folder / "config.json").read_text())
        return load_hand_written(
            folder, config, dtype=asked["dtype"], place=torch.device("cpu"), random_seed=asked["random_seed"]
        )

    def kernels(self, wanted: AheadOf) -> FakeKernels:
        self.compiled.append(FakeKernels(wanted))
        return self.compiled[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    found = FakeCard()
    monkeypatch.setattr(card, "find_card", lambda spec: "cpu")
    monkeypatch.setattr(card, "load_model", found.load)
    monkeypatch.setattr(card, "KernelsAhead", found.kernels)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (found.free, found.total))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    return found


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as name:
        yield Path(name)


def make_specs(run_dir: Path, folder: Path, layout: str = "colocated", **more: Any) -> list[EngineSpec]:
    config = make_tiny_checkpoint(folder / "whole", vocab_size=300, max_position_embeddings=256) / "config.json"
    (folder / "config.json").write_bytes(config.read_bytes())
    model = shape_of(folder, "tiny")
    settings = {
        "source": "tiny",
        "weights": "random",
        "layout": layout,
        "device": "cuda",
        "kv": KvSettings(memory_mib=1),
        "decode": DecodePoolSettings(**SMALL, max_running=4),
        **({"prefill": PrefillPoolSettings(**SMALL)} if layout == "disaggregated" else {}),
    }
    return [
        EngineSpec(
            engine_id=EngineId(f"{role}-0"),
            epoch=1,
            roles=frozenset({role}),
            model="tiny",
            settings=ModelSettings(**(settings | more)),
            transfer=TransferSettings(slots=2, slot_kib=64, pair_min_slots=1),
            folder=model.path,
            facts=model.facts,
            dtype="float32",
            run_dir=run_dir,
        )
        for role in LAYOUTS[layout]
    ]


def composed(spec: EngineSpec) -> tuple[EngineParts, list[str]]:
    from diptych.cluster.engine.compose import model_brain

    stages: list[str] = []
    return build(spec, model_brain, stages.append), stages


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_answers_come_from_engines_that_plan_for_a_card(
    fake: FakeCard, run_dir: Path, tmp_path: Path, layout: str
) -> None:
    engines = OfflineEngines(make_specs(run_dir, tmp_path, layout))
    infos = engines.start()
    try:
        answers = engines.generate([[3 + at, *range(at * 7)] for at in range(9)], 5, salt=b"")
        assert [answer.num_tokens for answer in answers] == [5] * 9
    finally:
        engines.stop()
    assert all(0 < info.num_blocks * info.block_tokens <= 1 << 20 for info in infos)


def test_settled_engines_have_nothing_left_to_prepare(fake: FakeCard, run_dir: Path, tmp_path: Path) -> None:
    decode = DecodePoolSettings(step_tokens=64, threads=1, max_running=40)
    engines = OfflineEngines(make_specs(run_dir, tmp_path, decode=decode))
    engines.start()
    try:
        engines.settle()
        [runner] = engines._runners
        assert not runner.idle(), "all graphs are there"
        assert gc.get_freeze_count() > 0
        [answer] = engines.generate([[3, 4, 5]], 5, salt=b"")
        assert answer.num_tokens == 5
    finally:
        engines.stop()
    assert gc.get_freeze_count() == 0


def test_the_start_tells_its_stages_and_its_plan(fake: FakeCard, run_dir: Path, tmp_path: Path) -> None:
    [spec] = make_specs(run_dir, tmp_path)
    parts, stages = composed(spec)
    assert stages == ["weights", "kernels", "rehearsal", "arena", "graphs", "cost", "runner", "warm-up"]
    assert parts.memory_plan.startswith("memory plan of decode-0's card (GiB)")
    assert isinstance(parts.runner, DeviceRunner)
    assert parts.runner.depth == 2
    assert parts.runner.graph_shapes
    assert parts.runner.cost is not None
    assert (parts.runner.max_slots, parts.runner.max_step_tokens) == (4, 64)


def test_kernels_are_compiled_while_weights_are_loaded_where_there_is_room(
    fake: FakeCard, run_dir: Path, tmp_path: Path
) -> None:
    [spec] = make_specs(run_dir, tmp_path, deterministic=True)
    composed(spec)
    [kernels] = fake.compiled
    assert kernels.events == ["begin", "join"]
    assert kernels.wanted.limits.max_step_tokens == 64
    assert kernels.wanted.deterministic
    fake.free = plan_card(spec, 0).used + (3 << 20)
    composed(spec)
    assert fake.compiled[1].events == [], "a few layers more have no room"


def test_kv_without_a_size_gets_what_the_card_has_left(fake: FakeCard, run_dir: Path, tmp_path: Path) -> None:
    [spec] = make_specs(run_dir, tmp_path, kv=KvSettings())
    fake.free = plan_card(spec, 0).used + (3 << 20)
    parts, _ = composed(spec)
    weights = num_weights(read_shape(json.loads((spec.folder / "config.json").read_text()))) * 4
    left = fake.free - weights - GRAPHS - RESERVE  # the rehearsal took nothing of this card
    assert parts.info.num_blocks == left // plan_card(spec, 0).bytes_per_block - 1


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    fake: FakeCard, run_dir: Path, tmp_path: Path
) -> None:
    [spec] = make_specs(run_dir, tmp_path)
    fake.free = GIB
    with pytest.raises(StartupError, match=r"GiB are missing(.|\n)*memory plan of the card") as refusal:
        composed(spec)
    assert fake.loads == []
    assert "choose a smaller model" in str(refusal.value)


def test_what_the_rehearsal_took_is_judged_again(
    fake: FakeCard, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [spec] = make_specs(run_dir, tmp_path)
    monkeypatch.setattr(card.Card, "_taken", lambda self: 2 * GIB)
    with pytest.raises(StartupError, match="GiB are missing"):
        composed(spec)
    assert len(fake.loads) == 1


def test_an_engine_takes_no_more_than_its_share(fake: FakeCard, run_dir: Path, tmp_path: Path) -> None:
    [spec] = make_specs(run_dir, tmp_path, gpu_share=0.25)
    with pytest.raises(StartupError, match=r"and 0\.75 GiB are free"):
        composed(spec)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_loading(fake: FakeCard, run_dir: Path, tmp_path: Path, deterministic: bool) -> None:
    [spec] = make_specs(run_dir, tmp_path, deterministic=deterministic)
    parts, _ = composed(spec)
    assert [asked["deterministic"] for asked in fake.loads] == [deterministic]
    told = [line for line in parts.info.degraded if line.startswith("deterministic: a step of 4 sequences takes ")]
    assert len(told) == deterministic, "with its cost"


def test_kv_of_deterministic_engines_is_not_that_of_others(fake: FakeCard, run_dir: Path, tmp_path: Path) -> None:
    roots = []
    for deterministic in (False, True):
        [spec] = make_specs(run_dir, tmp_path, deterministic=deterministic)
        roots.append(composed(spec)[0].pool.prefix_root)
    assert roots[0] != roots[1]


def test_the_pace_decides_whether_the_arbiter_is_asked(fake: FakeCard, run_dir: Path, tmp_path: Path) -> None:
    def goals(**decode: Any) -> Any:
        [spec] = make_specs(run_dir, tmp_path, decode=DecodePoolSettings(**SMALL, max_running=4, **decode))
        budget = composed(spec)[0].workers[Role.DECODE]._scheduler._budget  # type: ignore[attr-defined]
        return None if budget is None else (budget._goals.itl_target_s, budget._goals.itl_limit_s)

    assert goals() == (0.02, 0.05)
    assert goals(itl_target_s=0.01, itl_limit_s=0.03) == (0.01, 0.03)
    assert goals(pace="throughput") is None


def test_the_state_of_slots_and_of_drawn_rows_is_planned(run_dir: Path, tmp_path: Path) -> None:
    [spec] = make_specs(run_dir, tmp_path)
    state = DeviceState(
        max_slots=spec.max_slots,
        max_context_tokens=spec.wanted_context_tokens,
        block_tokens=spec.kv.block_tokens,
        spare_block=0,
        device=torch.device("cpu"),
        vocab_size=spec.facts.vocab_size,
    )
    space = SampleSpace(max_rows=spec.max_slots, vocab=spec.facts.vocab_size, device=torch.device("cpu"))
    held = state.words.nbytes + sum(part.nbytes for part in vars(space).values() if isinstance(part, torch.Tensor))
    planned = dict(plan_card(spec, GIB).rows)["state of sequences"]
    assert 0.95 * held <= planned <= 3 * held + (1 << 18)


def test_an_engine_without_a_card_to_see_says_what_it_sees(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [spec] = make_specs(run_dir, tmp_path)
    monkeypatch.setattr("diptych.cluster.control.cards.why_unusable", lambda: "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StartupError, match="torch finds no card, and CUDA_VISIBLE_DEVICES is ''"):
        composed(spec)
    monkeypatch.setattr("diptych.cluster.control.cards.why_unusable", lambda: "Triton needs a C compiler")
    with pytest.raises(StartupError, match=r"models\.tiny\.device is cuda.*: Triton needs a C compiler"):
        composed(spec)
