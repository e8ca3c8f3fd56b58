"""What no graph can hold is told, and computed without: transformers' models, and decoders that ask the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from device_requests import generate, requests_of, runner_of
from torch import Tensor

from diptych.kernels.device.graphs import NotCapturable, StepGraphs, decode_shape
from diptych.kernels.device.step import StepTensors
from diptych.kernels.device.testing import Storm, SumDecoder, make_runner, oracle
from diptych.kernels.model import load_model
from diptych.kernels.testing import ARCHITECTURES

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)


class Asking(SumDecoder):
    """Asks the device while it computes, and does not say so."""

    def forward(self, step: StepTensors, kv: Sequence[tuple[Tensor, Tensor]], logits_NV: Tensor) -> None:
        super().forward(step, kv, logits_NV)
        assert int(step.ids_T.sum()) >= -len(step.ids_T)


def test_a_decoder_that_asks_the_device_runs_without_graphs_and_that_is_told() -> None:
    runner, _ = make_runner(CARD, Asking())
    runner.rehearse()
    runner.capture()
    assert not runner.graph_shapes
    (told,) = runner.degraded
    assert "without CUDA graphs" in told
    assert "AcceleratorError" in told or "RuntimeError" in told
    storm = Storm(1)
    for _ in range(4):
        storm.add(30, 6)
    while storm.turn(runner.launch, runner.collect):
        pass
    for one in storm.finished:
        known = list(one.prompt)
        for token in one.tokens:
            assert token == oracle(known)
            known.append(token)


def test_a_failed_capture_leaves_the_stream_usable() -> None:
    x = torch.ones(4, device=CARD)
    asks = [True]

    def run(shape: object) -> None:
        x.mul_(2)
        if asks[0] and torch.cuda.is_current_stream_capturing():
            x.sum().item()

    graphs = StepGraphs(run, device=CARD)
    stream = torch.cuda.Stream(CARD)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with pytest.raises(NotCapturable):
            graphs.capture(decode_shape(1))
        assert not graphs.shapes
        asks[0] = False
        graphs.capture(decode_shape(2))
        graphs.replay(decode_shape(2))
        torch.cuda.synchronize()
    assert x.tolist() == [2.0**3] * 4  # once before each capture, and the replay


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "gpt2", "mixtral", "phi3", "qwen3-moe"])
def test_transformers_models_give_the_same_tokens_by_graphs_and_without(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].make(tmp_path / "model")
    model = load_model(folder, dtype="float32", device="cuda:0", by_hand=False)
    found = []
    for graphs in (False, True):
        runner = runner_of(model, CARD, blocks=6 * 20, step_tokens=100, graphs=graphs)
        assert bool(runner.graph_shapes) != (not graphs or bool(runner.degraded))
        one, *others = requests_of(4, 60, 8, model.vocab_size)
        found.append([token for token, _ in generate(runner, one, others, 25)])
    assert found[0] == found[1]
