"""Kernels that are compiled ahead are those that a model's steps will launch, and wishing for them runs nothing."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.cluster.bench.shapes import SHAPES
from diptych.kernels.device.ahead import AheadOf, KernelsAhead, rehearse, stand_in
from diptych.kernels.device.build import StepLimits
from diptych.kernels.models.shape import GenericOnly, read_shape
from diptych.kernels.ops import compiled, table

LIMITS = StepLimits(max_slots=6, max_step_tokens=48, max_context_tokens=64, block_tokens=16)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "num_hidden_layers": 5,
    "max_position_embeddings": 64,
}
DENSE = SHAPES["llama-8b"] | TINY
SPARSE = SHAPES["qwen3-30b-a3b"] | TINY
SPARSE |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}


class Kernel:
    """What Triton's JITFunction is asked ahead."""

    def __init__(self, *free: int) -> None:
        self.params = [type("Param", (), {"do_not_specialize": at in free}) for at in range(8)]
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def warmup(self, *args: Any, **options: Any) -> None:
        self.asked.append((args, options))

    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError("launched")


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def test_a_variant_is_asked_for_once_and_nothing_is_launched(pool: Executor) -> None:
    kernel, x = Kernel(1), torch.ones(4)
    with compiled.ahead(pool):
        for size in (1, 16, 17):  # not specialised: all the same
            compiled.launch(kernel, (2, 1, 1), (x, size, 0.5), num_warps=8, BLOCK=4)
        compiled.launch(kernel, (2, 1, 1), (x[1:], 1, 0.7), num_warps=8, BLOCK=4)
        compiled.launch(kernel, (0, 1, 1), (x, 1, 0.5), BLOCK=999)
    assert [args[0] for args, _ in kernel.asked] == [torch.float32], "of a tensor the type alone"
    assert kernel.asked[0][1] == {"grid": (1, 1, 1), "num_warps": 8, "num_stages": 3, "BLOCK": 4}


def test_what_makes_another_variant_is_asked_for_too(pool: Executor) -> None:
    kernel, x = Kernel(), torch.ones(4)
    with compiled.ahead(pool):
        for args in ((x, 1), (x, 16), (x, 17), (x, 33), (x.half(), 17), (x, None)):
            compiled.launch(kernel, (1, 1, 1), args, BLOCK=4)
        compiled.launch(kernel, (1, 1, 1), (x, 17), BLOCK=8)
        compiled.launch(kernel, (1, 1, 1), (x, 17), BLOCK=8, num_warps=2)
    assert len(kernel.asked) == 7


def test_other_threads_launch_meanwhile(pool: Executor) -> None:
    kernel, x = Kernel(), torch.ones(4)
    found: list[BaseException] = []

    def launch() -> None:
        try:
            compiled.launch(kernel, (1, 1, 1), (x,), BLOCK=4)
        except AssertionError as error:
            found.append(error)

    with compiled.ahead(pool):
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()
    assert [str(error) for error in found] == ["launched"]
    launch()
    assert len(found) == 2, "and this one, once the block has ended"
    assert kernel.asked == []


@pytest.mark.parametrize(
    ("kinds", "few"),
    [
        ([(None, False)] * 7, [(None, False)] * 2),
        ([(8, False), (None, False)] * 3, [(8, False), (None, False)] * 2),
        ([(None, True), (None, False), (8, True)], [(None, True), (None, False), (8, True)] * 2),
        ([(None, False), (None, True), (None, False)], [(None, True), (None, False)] * 2),
    ],
)
def test_a_stand_in_has_two_layers_of_each_kind_and_the_same_kind_last(kinds: Any, few: Any) -> None:
    windows, sparse = zip(*kinds, strict=True)
    shape = dataclasses.replace(read_shape(SPARSE), windows=windows, sparse=sparse, layers=len(kinds))
    found = stand_in(shape)
    assert list(zip(found.windows, found.sparse, strict=True)) == few
    assert found.layers == len(few)


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """The CPU's ops are a card's, whose launches are told here instead of compiled."""
    asked: list[tuple[str, Any]] = []

    def ask(seen: set[Any], kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        types = tuple(arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in args)
        asked.append((kernel.__name__, (types, tuple(options.items()))))

    monkeypatch.setattr(compiled, "_ask", ask)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setitem(table.IMPLEMENTATIONS, "cpu", table.IMPLEMENTATIONS["cuda"])
    table.implementation.cache_clear()
    yield asked
    table.implementation.cache_clear()


def wanted(folder: Path, config: dict[str, Any], *, deterministic: bool = False) -> AheadOf:
    (folder / "config.json").write_text(json.dumps(config))
    return AheadOf(folder=folder, dtype="bfloat16", device="cpu", deterministic=deterministic, limits=LIMITS)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("config", [DENSE, SPARSE, DENSE | {"architectures": ["Qwen2ForCausalLM"]}])
def test_the_stand_in_asks_for_every_variant_that_the_model_needs(
    as_on_a_card: list[tuple[str, Any]], tmp_path: Path, config: dict[str, Any], deterministic: bool
) -> None:
    ahead = KernelsAhead(wanted(tmp_path, config, deterministic=deterministic))
    ahead.begin()
    ahead.join()
    asked = set(as_on_a_card)
    as_on_a_card.clear()
    with ThreadPoolExecutor(1) as pool, compiled.ahead(pool):
        rehearse(read_shape(config), wanted(tmp_path, config, deterministic=deterministic))
    needed = set(as_on_a_card)
    assert needed <= asked, {name for name, _ in needed - asked}
    names = {name for name, _ in asked}
    attention = {"attend_tiles"} if deterministic else {"attend_rows", "attend_prompts"}
    assert attention | {"build_rows", "publish", "qk_write_heads", "add_norm_rows", "silu_mul_blocks"} <= names


def test_what_fails_ahead_is_left_to_the_rehearsal(
    as_on_a_card: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "_ask", broken)
    ahead = KernelsAhead(wanted(tmp_path, DENSE))
    ahead.begin()
    ahead.join()


def test_transformers_code_has_nothing_to_compile_ahead(tmp_path: Path) -> None:
    with pytest.raises(GenericOnly):
        KernelsAhead(wanted(tmp_path, DENSE | {"architectures": ["OtherForCausalLM"]}))


def test_a_compiled_kernel_is_made_ready_in_the_same_thread() -> None:
    """Its launcher is made by gcc when `run` is looked at."""
    from diptych.kernels.device.ahead import _Ready

    class Compiled:
        made_by = ""

        @property
        def run(self) -> None:
            type(self).made_by = threading.current_thread().name

    with ThreadPoolExecutor(1, thread_name_prefix="compiles") as pool:
        future: Future[Compiled] = _Ready(pool).submit(Compiled)
        assert future.result().made_by.startswith("compiles")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_on_a_card_the_rehearsal_finds_its_kernels_compiled(tmp_path: Path, config: dict[str, Any]) -> None:
    """Whatever is compiled during the real rehearsal was not asked for ahead."""
    from triton import knobs

    one = dataclasses.replace(wanted(tmp_path, config), device="cuda:0")
    ahead = KernelsAhead(one)
    ahead.begin()
    ahead.join()
    late: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *args, fn, **more: late.append(fn.name)
    try:
        rehearse(read_shape(config), one)
        torch.cuda.synchronize()
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert late == []
