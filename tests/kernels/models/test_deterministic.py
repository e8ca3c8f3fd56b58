"""Deterministic decoders: no bit of a request's logits depends on its company, its chunks, or what was cached of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_requests import generate, requests_of, runner_of
from device_steps import layout, new_kv, step_of
from torch import Tensor

from diptych.kernels.device.testing import BLOCK
from diptych.kernels.model import LoadedModel, load_hand_written, load_model
from diptych.kernels.models.by_hand import load_by_hand
from diptych.kernels.models.shape import read_shape
from diptych.kernels.ops import table
from diptych.kernels.testing import ARCHITECTURES, TinyArchitecture, make_tiny_checkpoint
from diptych.protos.errors import StartupError

LENGTH = 30  # tokens of the request that is looked at: number 0, and number 5, which is the same elsewhere
KERNELS = ("paged_attention", "qk_write", "linear", "add_norm", "silu_mul", "moe", "step_inputs")
Step = Sequence[tuple[int, int, int]]  # (request, tokens before, new tokens) of each row; rows of one token first

HISTORIES: dict[str, Sequence[Step]] = {
    "in chunks": ([(0, 0, 13)], [(0, 13, 4)], [(0, 17, 13)]),
    "token by token": ([(0, 0, 1)], [(0, 1, 24)], *([(0, at, 1)] for at in range(25, LENGTH))),
    "among others": (
        [(1, 0, 5)],
        [(1, 5, 1), (2, 0, 1), (0, 0, 19), (3, 0, 33)],
        [(3, 33, 1), (0, 19, 1), (2, 1, 1), (1, 6, 9)],
        [(2, 2, 1), (0, 20, 10), (1, 15, 17)],
    ),
    "behind more tokens than any tile has": ([(4, 0, 40), (3, 0, 40), (2, 0, 39), (1, 0, 37), (0, 0, LENGTH)],),
    "preempted and computed again elsewhere": (
        [(1, 0, 7), (0, 0, 9)],
        [(0, 9, 1), (1, 7, 1)],
        [(1, 8, 3), (5, 0, 12)],
        [(1, 11, 1), (5, 12, 18)],
    ),
}
QUICK = ("among others",)
_SMALL = {"num_hidden_layers": 2, "vocab_size": 80}
FAMILIES = {
    "llama": TinyArchitecture("llama", _SMALL),
    "qwen3-moe": TinyArchitecture("qwen3_moe", ARCHITECTURES["qwen3-moe"].sizes | _SMALL),
    "window and biases": TinyArchitecture("qwen2", ARCHITECTURES["qwen2"].sizes | _SMALL),
    "mixtral": TinyArchitecture("mixtral", ARCHITECTURES["mixtral"].sizes | {"num_key_value_heads": 1}),
}


@pytest.fixture(autouse=True)
def by_kernels(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The card's implementations, interpreted where there is none."""
    if place.type == "cpu":
        monkeypatch.setitem(table.IMPLEMENTATIONS, "cpu", table.IMPLEMENTATIONS["cpu"] | dict.fromkeys(KERNELS, "cuda"))
    table.implementation.cache_clear()
    yield
    table.implementation.cache_clear()


def loaded(folder: Path, place: torch.device, dtype: torch.dtype, *, deterministic: bool = True) -> LoadedModel:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = load_hand_written(folder, config, dtype="float32", place=place, random_seed=None)
    made = load_by_hand(folder, read_shape(config), dtype=dtype, device=place, random_seed=None)
    return replace(model, by_hand=made, dtype=str(dtype).removeprefix("torch."), deterministic=deterministic)


def id_of(request: int, position: int) -> int:
    return (31 * position + 7 * (request % 5)) % 79


def play(model: LoadedModel, place: torch.device, history: Sequence[Step]) -> list[dict[int, Tensor]]:
    """By position, the logits of each time that request 0 was computed."""
    decoder = model.decoder(max_tokens=200)
    kv = new_kv(model, place)
    found: dict[int, dict[int, Tensor]] = {}
    for rows in history:
        segments = layout(rows)
        at = [(request, position) for request, start, num in rows for position in range(start, start + num)]
        kept = [place for place, (request, _) in enumerate(at) if request % 5 == 0]
        ids = torch.tensor([id_of(*one) for one in at])
        step = step_of(model, segments, ids, torch.tensor(kept), place, by_kernels=True)
        logits = torch.full((len(kept), model.vocab_size), float("nan"), dtype=kv[0][0].dtype, device=place)
        decoder.forward(step, kv, logits)
        assert not step.flags_R.any()
        for place_in, row in zip(kept, logits.cpu(), strict=True):
            found.setdefault(at[place_in][0], {})[at[place_in][1]] = row
    assert any(sorted(rows) == list(range(LENGTH)) for rows in found.values())
    return list(found.values())


def same_bits(times: list[dict[int, Tensor]], wanted: Tensor) -> bool:
    return all(torch.equal(row, wanted[position]) for rows in times for position, row in rows.items())


def quick_or_slow(name: str, quick: Sequence[str]) -> Any:
    return pytest.param(name, marks=() if name in quick else pytest.mark.slow)


DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def bits_alone(model: LoadedModel, place: torch.device) -> Tensor:
    (alone,) = play(model, place, ([(0, 0, LENGTH)],))
    return torch.stack([alone[position] for position in range(LENGTH)])


@pytest.mark.parametrize("history", [quick_or_slow(name, QUICK) for name in HISTORIES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [quick_or_slow(name, ("llama", "qwen3-moe")) for name in FAMILIES])
def test_a_request_gives_the_same_bits_whatever_its_history(
    name: str, dtype: torch.dtype, history: str, tmp_path: Path, place: torch.device
) -> None:
    model = loaded(FAMILIES[name].make(tmp_path / "model"), place, dtype)
    with torch.inference_mode():
        assert same_bits(play(model, place, HISTORIES[history]), bits_alone(model, place))


def test_it_would_show_if_bits_differed(tmp_path: Path, place: torch.device) -> None:
    """The same histories without `deterministic`: decoding rows go another way than prompts."""
    model = loaded(FAMILIES["llama"].make(tmp_path / "model"), place, torch.float32, deterministic=False)
    with torch.inference_mode():
        assert not same_bits(play(model, place, HISTORIES["in chunks"]), bits_alone(model, place))


def test_a_work_list_of_the_other_kind_is_refused(tmp_path: Path, place: torch.device) -> None:
    folder = FAMILIES["llama"].make(tmp_path / "model")
    for deterministic in (True, False):
        model = loaded(folder, place, torch.float32, deterministic=deterministic)
        other = replace(model, deterministic=not deterministic)
        step = step_of(other, layout([(0, 0, 5)]), torch.arange(5), torch.arange(1), place, by_kernels=True)
        with pytest.raises(ValueError, match="work list"):
            model.decoder(max_tokens=8).forward(step, new_kv(model, place), torch.empty(1, model.vocab_size))


def test_it_is_refused_where_there_is_none(tmp_path: Path) -> None:
    folder = FAMILIES["llama"].make(tmp_path / "model")
    with pytest.raises(StartupError, match="CUDA devices, not on the CPU"):
        load_model(folder, dtype="float32", deterministic=True)
    with pytest.raises(StartupError, match="by hand-written decoders alone"):
        load_model(folder, dtype="float32", device="cuda:0", by_hand=False, deterministic=True)
    with pytest.raises(StartupError, match=r"by hand-written decoders alone.*no hand-written decoder for it"):
        load_model(
            ARCHITECTURES["olmo2"].make(tmp_path / "olmo2"), dtype="float32", device="cuda:0", deterministic=True
        )


@pytest.mark.gpu
def test_what_only_a_definition_computes_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", head_dim=260)
    with pytest.raises(StartupError, match=r"kernels alone.*head sizes up to 256"):
        load_model(folder, dtype="bfloat16", device="cuda:0", deterministic=True)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        pytest.param(45, torch.float32, marks=pytest.mark.slow),
        pytest.param(1500, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_runner_gives_the_same_logprobs_by_graphs_of_any_size_and_without(
    name: str, length: int, dtype: torch.dtype, tmp_path: Path, place: torch.device
) -> None:
    tiny = FAMILIES[name]
    sizes = dict(tiny.sizes) | {"max_position_embeddings": 2048, "head_dim": 16 if length < 100 else 64}
    folder = make_tiny_checkpoint(tmp_path / "model", tiny.model_type, **sizes)
    model = loaded(folder, place, dtype)
    blocks, wanted = 6 * -(-(length + 5) // BLOCK), None
    for graphs in (False, True):
        runner = runner_of(model, place, blocks=blocks, step_tokens=max(64, 2 * length), graphs=graphs)
        assert bool(runner.graph_shapes) == graphs
        for count, chunk in ((1, length), (1, length // 3), (6, length // 7), (3, length // 2)):
            one, *others = requests_of(count, length, 5, model.vocab_size)
            found = generate(runner, one, others, chunk)
            wanted = wanted or found
            assert found == wanted
        assert not runner.degraded or place.type == "cpu"
