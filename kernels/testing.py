"""Small random checkpoints for tests of any floor: a config.json and safetensors, no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}


def make_tiny_checkpoint(folder: Path, architecture: str = "llama", seed: int = 0, **sizes: Any) -> Path:
    """Write a random model of a transformers `model_type` into `folder` (made if need be) and return it.

    `sizes` are configuration fields over those above. Weights are larger than usual, so that greedy choices are clear.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **(_SIZES | {"initializer_range": 0.2} | sizes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = AutoModelForCausalLM.from_config
        model = build(config, dtype=torch.float32)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.to_json_file(folder / "config.json", use_diff=False)
    return folder
