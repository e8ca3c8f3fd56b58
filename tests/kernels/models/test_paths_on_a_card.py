"""On a card greedy tokens in float32 are those of transformers' `generate`, by every path that a model has."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from device_requests import generate, requests_of, runner_of
from reference import SENTENCES, Reference

from diptych.kernels.device.testing import BLOCK, Request
from diptych.kernels.model import load_model
from diptych.kernels.testing import ARCHITECTURES
from diptych.protos.step import SampleSpec

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)
PATHS: dict[str, dict[str, Any]] = {
    "by hand": {},
    "deterministic": {"deterministic": True},
    "transformers": {"by_hand": False},
}
BY_HAND = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "mixtral")


@cache
def reference_of(folder: Path) -> Reference:
    return Reference(folder)


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in sorted(ARCHITECTURES) for path in PATHS if name in BY_HAND or path == "transformers"],
)
def test_tokens_are_the_references(name: str, path: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].make(tmp_path / "model")
    model = load_model(folder, dtype="float32", device="cuda:0", **PATHS[path])
    for graphs in (False, True):
        runner = runner_of(model, CARD, blocks=6 * 25, step_tokens=100, graphs=graphs)
        one, *others = requests_of(4, 70, 16, model.vocab_size)
        generate(runner, one, others, 25)
        for request in (one, *others):
            reference_of(folder).check(request.prompt, request.tokens)


@pytest.mark.parametrize("path", PATHS)
def test_smollm2s_tokens_are_the_references(path: str) -> None:
    from tokenizers import Tokenizer

    folders = sorted((Path.home() / ".cache" / "diptych" / "models").glob("smollm2-135m-instruct-*"))
    if not folders:
        pytest.skip("the default model is not on this machine")
    tokenizer = Tokenizer.from_file(str(folders[0] / "tokenizer.json"))
    model = load_model(folders[0], dtype="float32", device="cuda:0", **PATHS[path])
    runner = runner_of(model, CARD, blocks=6 * 40, step_tokens=128, graphs=True)
    requests = []
    for slot, text in enumerate(SENTENCES):
        prompt = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        blocks = list(range(40 * slot, 40 * (slot + 1)))
        spec = SampleSpec(0.0, 1.0, 0, 0, 0, logprobs=0)
        requests.append(Request(prompt, slot, blocks, min(64, 40 * BLOCK - len(prompt)), spec))
    one, *others = requests
    generate(runner, one, others, 7)
    for request in requests:
        reference_of(folders[0]).check(request.prompt, request.tokens)
