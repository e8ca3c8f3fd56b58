from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.testing import make_tiny_checkpoint


def tensors(model: LoadedModel) -> dict[str, torch.Tensor]:
    return dict(model.module.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tmp_path: Path, architecture: str, tie: bool
) -> None:
    """Two engines of a pair must have one model without a file to share; and no file of weights may be needed."""
    folder = make_tiny_checkpoint(tmp_path, architecture, tie_word_embeddings=tie)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, again, other = (load_model(folder, dtype="float32", random_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.weights_digest == again.weights_digest != other.weights_digest
    matrices = [name for name, tensor in tensors(first).items() if tensor.dim() > 1]
    assert matrices
    for name, tensor in tensors(first).items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, tensors(again)[name]), name
    for name in matrices:
        assert not torch.equal(tensors(first)[name], tensors(other)[name]), name
        assert tensors(first)[name].std() > 0.01, name


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    tied = load_model(folder, dtype="float32", random_seed=1)
    untied = load_model(make_tiny_checkpoint(tmp_path, tie_word_embeddings=False), dtype="float32", random_seed=1)
    assert untied.weights_bytes - tied.weights_bytes == 512 * 64 * 4
