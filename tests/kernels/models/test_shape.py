"""What is read from a config.json, and what makes a model one for transformers' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.cluster.bench.shapes import SHAPES
from diptych.kernels.model import load_hand_written
from diptych.kernels.models.rope import frequencies
from diptych.kernels.models.shape import GenericOnly, read_shape
from diptych.kernels.models.tensors import weights_bytes
from diptych.kernels.testing import make_tiny_checkpoint

_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


def test_the_benchs_models_have_the_sizes_that_everybody_knows() -> None:
    llama, qwen = read_shape(SHAPES["llama-8b"]), read_shape(SHAPES["qwen3-30b-a3b"])
    assert weights_bytes(llama, torch.bfloat16) == 16_060_522_496
    assert weights_bytes(qwen, torch.bfloat16) == 61_064_245_248
    assert (qwen.experts is not None, all(qwen.sparse), qwen.head_norms, qwen.qkv_bias) == (True, True, True, False)
    assert (llama.experts, any(llama.sparse), llama.head_norms, llama.tied) == (None, False, False, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "no hand-written decoder"),
        ({"architectures": None}, "no hand-written decoder"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"partial_rotary_factor": 0.5}, "only a part of each head"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers in its config.json is '2'"),
        ({"num_attention_heads": 7}, "sizes are unusual"),
        ({"rms_norm_eps": None}, "unusual"),
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_transformers(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(GenericOnly, match=reason):
        read_shape(SHAPES["llama-8b"] | change)


@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "rope_theta", "num_key_value_heads", "vocab_size"])
def test_a_file_that_leaves_out_what_matters_is_left_to_transformers(key: str) -> None:
    config = {name: value for name, value in SHAPES["llama-8b"].items() if name != key}
    with pytest.raises(GenericOnly, match=key):
        read_shape(config)


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "linear", "rope_theta": 5e5, "factor": 3.0}, True),
        (_YARN, True),
        (_YARN | {"factor": 1.0}, True),
        (_YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7}, True),
        (_YARN | {"mscale": 0.9, "mscale_all_dim": 0.7, "truncate": False}, True),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            True,
        ),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, False),
    ],
)
def test_rotary_frequencies_are_transformers_own(rope: dict[str, Any], known: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = make_tiny_checkpoint(tmp_path, "llama", rope_parameters=rope, head_dim=64)
    shape = read_shape(json.loads((folder / "config.json").read_text()))
    if not known:
        with pytest.raises(GenericOnly, match="of type dynamic"):
            frequencies(shape.rope, 64)
        return
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    angles, scale = frequencies(shape.rope, 64)
    torch.testing.assert_close(angles, theirs.inv_freq, atol=0, rtol=1e-6)
    assert scale == pytest.approx(theirs.attention_scaling)


def test_the_spelling_before_transformers_5_is_read() -> None:
    old = {name: value for name, value in SHAPES["llama-8b"].items() if name != "rope_theta"}
    scaling = {"type": "linear", "factor": 2.0}
    shape = read_shape(old | {"rope_theta": 3e5, "rope_scaling": scaling})
    assert shape.rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    before = torch.get_rng_state()

    def tensors(seed: int) -> tuple[dict[str, torch.Tensor], bytes]:
        model = load_hand_written(folder, config, dtype="float32", place=torch.device("cpu"), random_seed=seed)
        assert model.by_hand is not None
        return dict(model.by_hand.tensors.each()), model.weights_digest

    (first, digest), (again, same), (other, another) = tensors(1), tensors(1), tensors(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert digest == same != another
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if name.endswith("norm"):
            assert (tensor == 1).all(), name
        else:
            assert not torch.equal(tensor, other[name]), name
            assert float(tensor.std()) == pytest.approx(0.2, rel=0.2), name
